// The status page: each process reports by itself every other second, and this draws what has come.
import {Comet} from "./comet.js"

const KEPT = 120 // reports that a chart shows
const GONE = 4 // missed reports, after which a process is not counted
const FORGOTTEN = 15 // and is not shown any more
const COLOURS = {poll: "--one", sse: "--two", websocket: "--three", follow: "--four"}
const NAMES = {poll: "long-poll", sse: "SSE", websocket: "WebSocket", follow: "in views"}

const root = document.getElementById("tornjango-status")
const given = JSON.parse(document.getElementById("tornjango-follow").textContent)
const processes = new Map()
const history = []
const $ = selector => root.querySelector(selector)
const sum = (values, of = value => value) => values.reduce((total, value) => total + of(value), 0)
const number = value => value.toLocaleString(undefined, {maximumFractionDigits: value < 10 ? 1 : 0})

new Comet(given.url, {cursor: given.cursor}).on(given.channel, take)
setInterval(draw, 2000)

function take(report) {
  const before = processes.get(report.id)?.report
  const seconds = before ? report.uptime - before.uptime : 0
  const rate = seconds > 0 ? (report.comet.published - before.comet.published) / seconds : 0
  processes.set(report.id, {report, rate, at: performance.now()})
}

function draw() {
  const now = performance.now()
  for (const [id, it] of processes) {
    it.missed = (now - it.at) / 1000 / it.report.every
    if (it.missed > FORGOTTEN) processes.delete(id)
  }
  const shown = [...processes.values()].sort((a, b) => a.report.host.localeCompare(b.report.host) || a.report.pid - b.report.pid)
  const alive = shown.filter(it => it.missed < GONE)
  if (!shown.length) return
  const point = summary(alive)
  history.push(point)
  if (history.length > KEPT) history.shift()
  state(alive)
  tiles(point, alive)
  areas($("[data-chart=readers]"), Object.keys(COLOURS).map(name => ({
    name: NAMES[name], colour: COLOURS[name], values: history.map(({readers}) => readers[name] ?? 0),
  })))
  areas($("[data-chart=rate]"), [{colour: "--one", values: history.map(({rate}) => rate)}])
  areas($("[data-chart=delay]"), [{colour: "--two", values: history.map(({delay}) => delay)}])
  rows($(".processes tbody"), shown.map(processRow))
  rows($(".channels tbody"), channelRows(alive))
}

function summary(alive) {
  const readers = {}
  for (const {report} of alive)
    for (const [name, count] of Object.entries(report.comet.readers)) readers[name] = (readers[name] ?? 0) + count
  return {
    readers,
    // With a broker, every process has every message.
    rate: Math.max(0, ...alive.map(it => it.rate)),
    delay: Math.max(0, ...alive.map(it => it.report.loop_delay * 1000)),
    requests: sum(alive, it => it.report.in_flight),
  }
}

function state(alive) {
  const bad = alive.filter(it => it.report.comet.lost)
  const line = $(".state")
  line.classList.toggle("bad", bad.length > 0 || !alive.length)
  line.textContent = !alive.length ? "No process reports any more."
    : bad.length ? "The broker cannot be reached; readers wait, and miss nothing."
    : `${alive.length} ${alive.length === 1 ? "process reports" : "processes report"}, every ${alive[0].report.every} seconds.`
}

function tiles(point, alive) {
  const comet = alive[0]?.report.comet
  const values = {
    readers: number(sum(Object.values(point.readers))),
    rate: number(point.rate),
    requests: number(point.requests),
    delay: `${number(point.delay)} ms`,
    broker: comet ? comet.broker : "–",
    "broker-note": comet?.lost ? `broker, lost for ${number(comet.lost)} s` : comet ? `broker, lag ${number(comet.lag * 1000)} ms` : "broker",
  }
  for (const [name, value] of Object.entries(values)) $(`[data-tile="${name}"]`).textContent = value
  $("[data-tile=broker]").parentElement.classList.toggle("bad", Boolean(comet?.lost))
}

function processRow({report, missed}) {
  const {workers, comet} = report
  const readers = Object.entries(comet.readers).filter(([, count]) => count)
  return [missed >= GONE ? "gone" : "", [
    [`${report.host}`, ` process ${report.pid}`],
    [duration(report.uptime)],
    [number(report.connections)],
    [number(sum(readers, ([, count]) => count)), readers.map(([name, count]) => ` ${NAMES[name] ?? name} ${number(count)}`).join(",")],
    [number(report.in_flight)],
    [meter(workers.busy, workers.size), workers.waiting ? ` ${number(workers.waiting)} waiting` : ""],
    [...Object.entries(report.pools).filter(([, pool]) => pool.size).map(([alias, pool]) => meter(pool.busy ?? 0, pool.size, alias))],
    [`${number(report.loop_delay * 1000)} ms`],
    [comet.lost ? `lost for ${number(comet.lost)} s` : comet.broker, comet.unpublished ? ` ${number(comet.unpublished)} unpublished` : ""],
  ]]
}

function channelRows(alive) {
  const found = new Map()
  for (const {report} of alive)
    for (const channel of report.newest) {
      const other = found.get(channel.name)
      if (!other) found.set(channel.name, {...channel, lag: report.comet.lag})
      else {
        other.readers += channel.readers
        other.rate = Math.max(other.rate, channel.rate)
        other.age = Math.min(other.age, channel.age)
        other.lag = Math.max(other.lag, report.comet.lag)
      }
    }
  const channels = [...found.values()].sort((a, b) => b.rate - a.rate || a.age - b.age)
  const most = Math.max(1, ...channels.map(({rate}) => rate))
  return channels.map(channel => ["", [
    [channel.name],
    [number(channel.readers)],
    [bar(channel.rate / most), number(channel.rate)],
    [`${number(channel.lag * 1000)} ms`],
    [`${number(channel.bytes / 1024)} KiB`],
    [`${duration(channel.age)} ago`],
  ]])
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`
}

function meter(value, most, label = "") {
  const element = document.createElement("span")
  const gauge = document.createElement("meter")
  Object.assign(gauge, {max: most, value, low: most * 0.7, high: most * 0.9, optimum: 0})
  element.append(gauge, `${label} ${value}/${most} `)
  return element
}

function bar(share) {
  const element = document.createElement("span")
  element.className = "bar"
  element.style.width = `${share * 6}rem`
  return element
}

/** Each row: a class, and cells of what stands out and what goes with it. */
function rows(body, rows) {
  body.replaceChildren(...rows.map(([className, cells]) => {
    const row = document.createElement("tr")
    row.className = className
    row.append(...cells.map(parts => {
      const cell = document.createElement("td")
      for (const [index, part] of parts.entries()) {
        if (part instanceof Element || index === 0) cell.append(part)
        else if (part) cell.append(Object.assign(document.createElement("small"), {textContent: part}))
      }
      return cell
    }))
    return row
  }))
}

function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name)
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value)
  if (text !== undefined) element.textContent = text
  return element
}

/** Stacked areas, the newest values at the right; named ones have a legend. */
function areas(chart, series) {
  const [width, height, left, top, bottom] = [chart.clientWidth || 300, chart.clientHeight || 144, 34, 16, 14]
  const length = series[0].values.length
  const totals = Array.from({length}, (_, index) => sum(series, ({values}) => values[index]))
  const most = nice(Math.max(1, ...totals))
  const x = index => left + (width - left) * (1 - (length - 1 - index) / (KEPT - 1))
  const y = value => top + (height - top - bottom) * (1 - value / most)
  const parts = [0, most / 2, most].flatMap(value => [
    svg("line", {class: "grid", x1: left, x2: width, y1: y(value), y2: y(value)}),
    svg("text", {x: left - 5, y: y(value) + 4, "text-anchor": "end"}, number(value)),
  ])
  let below = Array(length).fill(0)
  let from = left
  for (const {name, colour, values} of series) {
    if (!values.some(Boolean)) continue
    const above = below.map((value, index) => value + values[index])
    const edge = above.map((value, index) => `${x(index)},${y(value)}`)
    const back = below.map((value, index) => `${x(index)},${y(value)}`).reverse()
    const fill = `var(${colour})`
    parts.push(
      svg("polygon", {points: [...edge, ...back].join(" "), style: `fill: ${fill}; opacity: 0.25`}),
      svg("polyline", {points: edge.join(" "), style: `fill: none; stroke: ${fill}; stroke-width: 1.5`}),
    )
    if (name) {
      parts.push(svg("rect", {x: from, y: 0, width: 9, height: 9, style: `fill: ${fill}`}), svg("text", {x: from + 13, y: 9}, name))
      from += 28 + name.length * 6
    }
    below = above
  }
  parts.push(svg("text", {x: width, y: height, "text-anchor": "end"}, "now"), svg("text", {x: left, y: height}, "4 min ago"))
  chart.replaceChildren(...parts)
}

/** The next of 1, 2, 5, 10, 20... */
function nice(value) {
  const step = 10 ** Math.floor(Math.log10(value))
  return [1, 2, 5, 10].map(factor => factor * step).find(it => it >= value)
}
