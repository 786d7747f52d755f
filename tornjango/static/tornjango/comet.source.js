/**
 * Follows channels of a tornjango site: every message in order and once, over one connection for all tabs of a browser.
 *
 *   import {Comet} from "{% static 'tornjango/comet.js' %}"          (or comet.classic.js, and then window.Comet)
 *   new Comet("/comet/").on("room:7", (data, {channel, event}) => ..., {gap: () => location.reload()})
 *
 * What can be called is in comet.d.ts. Feed is the connection, Comet a tab that hears of a feed: its own, or the one of
 * the tab that leads. An answer tells by offsets where it begins and ends in each channel, so that a tab knows what it has
 * seen, and fetches for itself what its feed has passed before it was there.
 */

const TRANSPORTS = ["socket", "sse", "poll"]
// A stream that has brought nothing by then is being collected by a proxy; one that falls silent, is dead.
const FIRST_BYTE = 3000
const SILENCE = 60_000
const FIRST_DELAY = 500
const LONGEST_DELAY = 30_000
// After which a better transport is tried again: at first, and at most.
const UPGRADE = 10_000
const LAST_UPGRADE = 600_000
const LONGEST_QUERY = 1500
const MOST_QUEUED = 100
// Statuses below 500 that pass by themselves.
const PASSING = [408, 425, 429]
const RESTARTED = new Error("restarted")

const browser = globalThis
const identifier = () => Array.from({length: 4}, () => Math.random().toString(36).slice(2, 8)).join("")
const backOff = failures => Math.random() * Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** failures)
const isFinal = ({status}) => status >= 400 && status < 500 && !PASSING.includes(status)

const offline = () => browser.navigator?.onLine === false

// Throws where the browser forbids it: then nothing is remembered.
function storage() {
  try { return browser.sessionStorage } catch { return null }
}

function report(error) {
  browser.reportError ? reportError(error) : console.error(error)
}

function failure(message, detail) {
  return Object.assign(new Error(message), detail)
}

async function refusal(response) {
  const {error, channels} = await response.json().catch(() => ({}))
  const {status, statusText, headers} = response
  const retryAfter = 1000 * headers.get("Retry-After") || 0
  return failure(error ?? `${status} ${statusText}`, {status, channels, retryAfter})
}

function parameters(channels, options) {
  const given = Object.entries(options).filter(([, value]) => value != null)
  return new URLSearchParams([...[...channels].map(channel => ["channel", channel]), ...given])
}

/** One poll: an answer, or an Error with `status`. */
async function poll(url, query, signal) {
  const options = {signal, cache: "no-store", headers: {Accept: "application/json"}}
  const long = `${query}`.length > LONGEST_QUERY
  const response = await fetch(long ? url : `${url}?${query}`, long ? {...options, method: "POST", body: query} : options)
  if (!response.ok) throw await refusal(response)
  return response.json()
}

/** One connection, over the best transport that works. Calls `heard(answer)` for all that comes, each once. */
class Feed {
  status = "connecting"
  channels = new Set()
  at = {}
  facts = {transport: null, tries: 0, error: null, roundTrip: null, buffering: false}
  #failures = 0
  #level = 0
  #lost = new Set()
  #publishing = new Map()
  #published = 0
  #running = false
  #closed = false
  #alarm
  #awaken = () => {}

  // `cursor` is where it begins; `at`, `epoch` and `grant` are known if another feed was there before.
  constructor(address, {transports, timeout, client}, {cursor, at = {}, epoch, grant}, {heard, told, refused}) {
    Object.assign(this, {address, transports, timeout, client, cursor, at, epoch, grant, heard, told, refused})
    this.origin = Object.keys(at).length ? null : cursor
    this.key = `comet ${address("")}`
    this.#level = this.#remembered()
  }

  follow(channels) {
    const added = channels.filter(channel => !this.channels.has(channel))
    const left = [...this.channels].filter(channel => !channels.includes(channel))
    this.channels = new Set(channels)
    for (const channel of left) delete this.at[channel]
    if (!this.#running) return void this.#run()
    if (!added.length && !left.length) return
    if (!this.send || !channels.length) return this.restart()
    if (left.length) this.send({leave: left})
    if (added.length) this.#ask(added)
  }

  close() {
    this.#closed = true
    this.restart()
  }

  // The cursor is still ours, so nothing is lost.
  restart() {
    this.abort?.(RESTARTED)
    this.wake()
  }

  wake() { this.#awaken() }

  async #run() {
    this.#running = true
    while (this.channels.size && !this.#closed) {
      const delay = offline() ? Infinity : await this.#attempt()
      if (delay && !this.#closed) await this.#pause(delay)
    }
    this.#running = false
  }

  #wind(time) {
    clearTimeout(this.#alarm)
    this.#alarm = setTimeout(() => this.abort?.(failure("nothing came", {silent: true})), time)
  }

  #pause(delay) {
    this.#tell("waiting", {delay})
    return new Promise(resolve => {
      const timer = delay < Infinity && setTimeout(resolve, delay)
      this.#awaken = () => { clearTimeout(timer); resolve() }
    })
  }

  // How long to wait before the next.
  async #attempt() {
    const kind = this.transports[this.#level]
    const control = new AbortController()
    const last = this.#level === this.transports.length - 1
    const began = performance.now()
    this.abort = reason => control.abort(reason)
    this.#wind(kind === "poll" ? this.timeout : FIRST_BYTE)
    this.answered = () => {
      this.answered = () => {}
      this.#failures = 0
      this.trouble = null
      if (kind !== "poll") this.facts.roundTrip = Math.round(performance.now() - began)
      if (this.facts.transport !== kind) this.#remember(kind)
      if (this.#level && kind !== "poll") this.upgrade = setTimeout(() => this.#tryBetter(), this.until - Date.now())
      this.#tell("open")
    }
    this.retry = 0
    this.facts.tries++
    try {
      await {socket: this.#socket, sse: this.#sse, poll: this.#poll}[kind].call(this, control.signal)
      if (kind === "poll" && this.#level && Date.now() > this.until) this.#tryBetter()
      return this.retry || (kind === "poll" ? 0 : backOff(0))
    } catch (error) {
      if (error === RESTARTED) return 0
      if (this.retry) return this.retry
      const {refused, silent, retryAfter = 0} = this.facts.error = this.trouble = error
      const opened = this.facts.transport === kind
      if (silent && !opened && kind !== "poll") this.facts.buffering = true
      if (refused || last && isFinal(error)) return this.#judge()
      // Unknown to the server, refused by a proxy, or just the network: the next transport will show.
      if (!last && !opened && !retryAfter) return void this.#level++
      this.facts.transport = null
      this.#level = this.#remembered()
      return retryAfter + backOff(this.#failures++)
    } finally {
      clearTimeout(this.#alarm)
      clearTimeout(this.upgrade)
      this.send = this.abort = null
    }
  }

  // Which transport works here, for the pages of this tab; and when to try a better one.

  #remembered() {
    const [kind, until, pause] = JSON.parse(storage()?.getItem(this.key) ?? "[]")
    this.until = until ?? 0
    this.pauseBetween = pause ?? 0
    return Date.now() < this.until ? Math.max(0, this.transports.indexOf(kind)) : 0
  }

  #remember(kind) {
    this.facts.transport = kind
    this.pauseBetween = this.#level && Math.min(LAST_UPGRADE, this.pauseBetween * 2 || UPGRADE)
    this.until = Date.now() + this.pauseBetween
    storage()?.setItem(this.key, JSON.stringify([kind, this.until, this.pauseBetween]))
  }

  #tryBetter() {
    this.#level = 0
    this.facts.transport = null
    this.restart()
  }

  // The transports. Each returns when it has ended in order, and else throws.

  #query(more) {
    return parameters(this.channels, {cursor: this.cursor, grant: this.grant, client: this.client, ...more})
  }

  async #poll(signal) {
    this.#take(await poll(this.address("poll/"), this.#query(), signal))
  }

  // By fetch, for EventSource tells no status.
  async #sse(signal) {
    const options = {signal, cache: "no-store", headers: {Accept: "text/event-stream"}}
    const response = await fetch(`${this.address("sse/")}?${this.#query()}`, options)
    if (!response.ok) throw await refusal(response)
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    for (let text = "", part; !(part = await reader.read()).done;) {
      const events = (text + part.value).split("\n\n")
      text = events.pop()
      this.#wind(this.timeout)
      for (const event of events) {
        const data = /^data:\s?(.*)/m.exec(event)?.[1]
        if (data) this.#frame(JSON.parse(data))
      }
    }
  }

  #socket(signal) {
    return new Promise((resolve, reject) => {
      const url = `${this.address("socket/")}`.replace("http", "ws")
      const socket = new WebSocket(`${url}?${parameters([], {client: this.client})}`)
      signal.onabort = () => { reject(signal.reason); socket.close() }
      socket.onopen = () => {
        this.send = frame => socket.send(JSON.stringify(frame))
        this.#ask([...this.channels])
      }
      socket.onmessage = ({data}) => {
        if (signal.aborted) return
        try { this.#frame(JSON.parse(data)) } catch (error) { this.abort(error) }
      }
      socket.onclose = ({code, reason}) => reject(failure(`the WebSocket was closed: ${code} ${reason}`))
    }).finally(() => {
      for (const {reject} of this.#publishing.values()) reject(failure("the connection was lost: it may be published, or not"))
      this.#publishing.clear()
    })
  }

  #ask(channels) {
    this.send({follow: channels, cursor: this.cursor ?? undefined, grant: this.grant ?? undefined})
  }

  publish(message) {
    return new Promise((resolve, reject) => {
      this.#publishing.set(++this.#published, {resolve, reject})
      this.send({publish: message, id: this.#published})
    })
  }

  // What comes.

  #frame(frame) {
    this.#wind(this.timeout)
    if ("published" in frame) {
      const {resolve, reject} = this.#publishing.get(frame.published)
      this.#publishing.delete(frame.published)
      frame.error ? reject(failure(frame.error, {status: frame.status, retryAfter: frame.retry ?? 0})) : resolve()
    } else if ("error" in frame) throw failure(frame.error, {status: frame.status, retryAfter: frame.retry, refused: isFinal(frame)})
    else this.#take(frame)
  }

  #take(answer) {
    const {cursor, grant, at = {}, epoch, retry, messages} = answer
    this.answered()
    this.retry = retry
    const gaps = [...new Set([...answer.gaps, ...this.#lost])]
    this.#lost.clear()
    const from = epoch === this.epoch ? this.at : {}
    const origin = this.origin
    if (Object.keys(at).length) this.origin = null
    Object.assign(this, {cursor, at, epoch, grant: grant ?? this.grant})
    this.heard({...answer, grant: this.grant, messages, gaps, at, from, origin})
  }

  // Where it stands, for a tab that comes later.
  get state() {
    const {cursor, at, epoch, grant, client} = this
    return {messages: [], offsets: [], gaps: [], cursor, at, epoch, grant, client, from: at}
  }

  // Something was refused: what, polls will say; and a session may have begun since a stream was opened.
  async #judge() {
    this.#level = this.#remembered()
    const channels = [...this.channels]
    const error = await this.#refusal(channels)
    if (!error) return backOff(1)
    if (!isFinal(error)) return error.retryAfter + backOff(this.#failures++)
    if (error.status === 400 && this.cursor && await this.#refusal(channels.slice(0, 1))) return this.#startAnew()
    const refused = []
    for (const channel of channels) {
      const own = await this.#refusal([channel])
      if (own && isFinal(own)) refused.push([channel, own])
    }
    for (const [channel, own] of refused) this.#refuse(channel, own)
    if (refused.length) return 0
    // Each alone is welcome, so they are too many.
    this.refused([], error)
    return backOff(this.#failures++)
  }

  #refusal(channels) {
    const query = parameters(channels, {cursor: this.cursor, grant: this.grant, wait: 0})
    return poll(this.address("poll/"), query).then(() => null, error => ({retryAfter: 0, ...error, message: error.message}))
  }

  #refuse(channel, error) {
    this.channels.delete(channel)
    delete this.at[channel]
    this.refused([channel], error)
  }

  // The cursor is of another time (a changed secret key): a gap, which is told once there is a new one.
  #startAnew() {
    this.cursor = this.grant = this.origin = null
    this.at = {}
    for (const channel of this.channels) this.#lost.add(channel)
    return 0
  }

  #tell(status, detail = {}) {
    if (this.#closed || this.status === status && status !== "waiting") return
    this.status = status
    this.told(status, {...detail, error: this.trouble})
  }
}

/** The tabs that follow one site. The one with the lock leads, and hears what the others want for as long as they live. */
class Tabs {
  wants = new Map()
  leads = false
  #alive = false
  #wanted = []
  #pending = new AbortController()

  constructor(name, identifier, {lead, hear, changed}) {
    Object.assign(this, {name, identifier, hear, changed})
    const left = new Promise(resolve => { this.release = resolve })
    this.channel = new BroadcastChannel(name)
    this.channel.onmessage = ({data}) => this.#hear(data)
    this.#lock(identifier, () => { this.#alive = true; this.#tell(); return left })
    this.#lock("lead", () => { this.leads = true; lead(); this.post({lead: true}); return left })
  }

  want(channels) {
    this.#wanted = channels
    this.#tell()
  }

  post(news) { this.channel.postMessage(news) }

  leave() {
    this.#pending.abort()
    this.release()
    this.channel.close()
  }

  #tell() {
    if (this.#alive && !this.leads) this.post({want: this.#wanted, from: this.identifier})
  }

  #hear(news) {
    const {lead, want, from} = news
    if (lead) return this.#tell()
    if (!want) return this.hear(news)
    if (!this.leads) return
    // A tab holds the lock of its own name: whoever gets it after, knows that the tab is gone.
    if (!this.wants.has(from)) this.#lock(from, () => { this.wants.delete(from); this.changed() })
    this.wants.set(from, want)
    this.changed()
  }

  #lock(what, action) {
    const {signal} = this.#pending
    const given = () => signal.aborted ? null : action()
    navigator.locks.request(`${this.name} ${what}`, {signal}, given).catch(error => signal.aborted || report(error))
  }
}

/** What a page makes: it follows channels, and tells callbacks what comes. */
export class Comet {
  onstatus = null
  #options
  #address
  #identifier = identifier()
  #status = "connecting"
  #listening = new AbortController()
  // By channel: its callbacks; the cursor to go on from; the offset up to which it was told.
  #followers = new Map()
  #places = new Map()
  #seen = new Map()
  #epoch
  #cursor
  #queue = []
  #working = false
  #failures = 0
  #oneByOne = false
  #wanting = false
  #feed = null
  #tabs = null
  // What the leader has said last: where the next one begins.
  #last = {client: this.#identifier}
  #facts = {}

  // Without `url`, it begins as the page's {% comet %} says.
  constructor(url, {transports = TRANSPORTS, timeout = SILENCE, shared = true, csrfCookie = "csrftoken", cursor, grant} = {}) {
    const given = JSON.parse(url == null && document.querySelector("script[data-comet]")?.textContent || "{}")
    url ??= given.urls?.poll?.replace(/poll\/$/, "") ?? "/comet/"
    this.#options = {transports, timeout, shared, csrfCookie, cursor: cursor ?? given.cursor}
    this.#last.grant = grant
    const base = new URL(url.replace(/\/*$/, "/"), browser.location?.href)
    this.#address = path => new URL(path, base)
    const heed = (event, action) => browser.addEventListener?.(event, action, {signal: this.#listening.signal})
    const wake = () => { this.#feed ? this.#feed.wake() : this.#pass({wake: true}) }
    // A network that is back may have taken the connection with it; a page that is back only stops waiting.
    for (const event of ["online", "offline"]) heed(event, () => this.#feed?.restart())
    heed("focus", wake)
    heed("visibilitychange", () => document.hidden || wake())
    // A page in the back/forward cache may not hold a connection.
    heed("pagehide", () => this.#leave())
    heed("pageshow", ({persisted}) => persisted && this.#want())
  }

  get cursor() { return this.#cursor ?? this.#options.cursor ?? null }
  get status() { return this.#status }

  on(channel, callback, {gap, refused, event} = {}) {
    if (this.#status === "closed") throw new Error("This Comet is closed; make a new one.")
    const followers = this.#followers.get(channel)
    this.#followers.set(channel, [...(followers ?? []), {callback, gap, refused, event}])
    if (!this.#places.has(channel)) this.#places.set(channel, this.#options.cursor)
    if (!followers) this.#want()
    return this
  }

  off(channel, callback) {
    const left = (this.#followers.get(channel) ?? []).filter(follower => callback && follower.callback !== callback)
    if (left.length) this.#followers.set(channel, left)
    else this.#drop(channel)
    return this
  }

  close() {
    this.#listening.abort()
    this.#followers.clear()
    this.#queue.length = 0
    this.#leave()
    this.#tell("closed")
  }

  publish(channel, data, event = null) {
    const message = {channel, event, data}
    return this.#feed?.send ? this.#feed.publish(message) : this.#post(message)
  }

  diagnostics() {
    const {transport = null, tries = 0, error = null, roundTrip = null, buffering = false, tabs = 1} = this.#feed ? this.#known : this.#facts
    return {status: this.#status, transport, tries, error, roundTrip, buffering, tabs, leads: this.#feed !== null}
  }

  get #known() {
    const {error, ...facts} = this.#feed.facts
    return {...facts, error: error?.message ?? null, tabs: 1 + (this.#tabs?.wants.size ?? 0)}
  }

  async #post(message) {
    const headers = {"Content-Type": "application/json", "X-CSRFToken": this.#cookie ?? ""}
    const response = await fetch(this.#address("publish/"), {method: "POST", headers, body: JSON.stringify(message)})
    if (!response.ok) throw await refusal(response)
  }

  get #cookie() {
    const pairs = (browser.document?.cookie ?? "").split("; ").map(pair => pair.split("="))
    return pairs.find(([name]) => name === this.#options.csrfCookie)?.[1]
  }

  #drop(channel) {
    this.#seen.delete(channel)
    this.#places.set(channel, null)
    if (this.#followers.delete(channel)) this.#want()
  }

  // Whatever is followed in the same turn of the page is asked for together.
  #want() {
    if (this.#wanting) return
    this.#wanting = true
    queueMicrotask(() => {
      this.#wanting = false
      if (this.#feed) this.#spread()
      else if (this.#tabs || this.#followers.size) this.#join()
    })
  }

  #join() {
    const {locks} = browser.navigator ?? {}
    if (!this.#options.shared || !locks || !browser.BroadcastChannel) return this.#lead()
    // Whoever logs in gets another CSRF cookie: no tab hears what another user's connection brings.
    this.#tabs ??= new Tabs(`${this.#address("")} ${this.#cookie}`, this.#identifier, {
      lead: () => this.#lead(), hear: news => this.#hear(news), changed: () => this.#spread(),
    })
    this.#tabs.want([...this.#followers.keys()])
  }

  #leave() {
    if (this.#feed) {
      const {cursor, at, epoch, grant} = this.#feed
      Object.assign(this.#last, {cursor, at, epoch, grant})
      this.#feed.close()
    }
    this.#tabs?.leave()
    this.#feed = this.#tabs = null
  }

  #lead() {
    const {cursor = this.#options.cursor, client} = this.#last
    this.#feed = new Feed(this.#address, {...this.#options, client}, {...this.#last, cursor}, {
      heard: answer => {
        this.#pass({answer: {...answer, client}})
        this.#receive(answer)
      },
      told: (status, detail) => {
        this.#pass({status, detail, facts: this.#known})
        this.#tell(status, detail)
      },
      refused: (channels, error) => {
        const others = this.#tabs?.wants.size
        this.#pass({refused: channels, error})
        if (channels.length || !others) this.#refused(channels.length ? channels : [...this.#followers.keys()], error)
        else { this.#tabs.wants.clear(); this.#spread() }
      },
    })
    this.#spread()
  }

  #spread() {
    const feed = this.#feed
    if (!feed) return
    const wanted = this.#tabs ? [...this.#tabs.wants.values()].flat() : []
    feed.follow([...new Set([...this.#followers.keys(), ...wanted])])
    this.#pass({status: feed.status, facts: this.#known})
    // For whoever is new to a channel that is followed already.
    if (!Object.keys(feed.at).length) return
    this.#pass({answer: feed.state})
    this.#receive(feed.state)
  }

  #pass(news) { this.#tabs?.post(news) }

  #hear({answer, status, detail, facts, refused, error, wake}) {
    if (wake) this.#feed?.wake()
    if (answer) {
      const {cursor, at, epoch, grant, client} = answer
      if (!this.#feed) this.#last = {cursor, at, epoch, grant, client}
      this.#receive(answer)
    }
    if (status && !this.#feed) {
      this.#facts = facts
      this.#tell(status, detail)
    }
    if (refused?.length) this.#refused(refused, error)
    else if (refused && !this.#feed) {
      // The tabs want too much for one connection.
      this.#leave()
      this.#options.shared = false
      this.#lead()
    }
  }

  // What comes, one answer after the other.

  #receive(answer) {
    this.#queue.push(answer)
    // What is left out here is missed by the next, and fetched then.
    if (this.#queue.length > MOST_QUEUED) this.#queue.splice(1, this.#queue.length - 2)
    if (!this.#working) this.#work()
  }

  async #work() {
    this.#working = true
    while (this.#queue.length) {
      const [answer] = this.#queue
      const behind = this.#behind(answer)
      if (behind.length) {
        await this.#catchUp(behind[0], answer)
        if (this.#epoch === answer.epoch || this.#queue.length < 2) continue
      } else this.#deliver(answer)
      this.#queue.shift()
    }
    this.#working = false
  }

  // The channels of which something has come before this answer that is not known here.
  #behind({at = {}, from, epoch, gaps, origin}) {
    return Object.keys(at).filter(channel => {
      if (!this.#followers.has(channel) || gaps.includes(channel)) return false
      const seen = this.#seen.get(channel)
      const place = this.#places.get(channel)
      if (seen === undefined) return place && place !== origin
      return epoch !== this.#epoch || !(seen >= at[channel] || from[channel] <= seen)
    })
  }

  async #catchUp(channel, {at, epoch}) {
    const cursor = this.#places.get(channel)
    try {
      const answer = await poll(this.#address("poll/"), parameters([channel], {cursor, grant: this.#last.grant, wait: 0}))
      this.#deliver(answer)
      this.#failures = 0
      // Another process of the site may be behind.
      if (answer.more || answer.at[channel] >= at[channel]) return
    } catch (error) {
      if (error.status === 400 && cursor) return this.#deliver({messages: [], gaps: [channel], at: {[channel]: at[channel]}, epoch})
      if (isFinal(error)) return this.#refused([channel], error)
    }
    await new Promise(resolve => setTimeout(resolve, backOff(this.#failures++)))
  }

  #deliver({messages, offsets = [], gaps, at = {}, epoch, cursor}) {
    for (const channel of gaps) this.#gap(channel, at[channel])
    messages.forEach(({channel, event, data}, index) => {
      if (offsets[index] <= this.#seen.get(channel)) return
      for (const follower of this.#followers.get(channel) ?? [])
        if (!follower.event || follower.event === event) this.#call(follower.callback, data, {channel, event})
    })
    for (const channel of Object.keys(at).filter(channel => this.#followers.has(channel))) {
      this.#seen.set(channel, epoch === this.#epoch ? Math.max(at[channel], this.#seen.get(channel) ?? 0) : at[channel])
      this.#places.set(channel, cursor)
    }
    this.#epoch = epoch
    if ([...this.#followers.keys()].every(channel => channel in at)) this.#cursor = cursor
  }

  #gap(channel, offset) {
    const followers = this.#followers.get(channel)
    if (!followers) return
    this.#seen.set(channel, offset)
    const told = followers.filter(({gap}) => gap)
    if (!told.length) console.warn(`comet: messages of ${channel} were lost, and no gap callback is there`)
    for (const {gap} of told) this.#call(gap, channel)
  }

  #refused(channels, error) {
    for (const channel of channels) {
      const followers = this.#followers.get(channel) ?? []
      const told = followers.filter(({refused}) => refused)
      if (followers.length && !told.length) console.error(`comet: ${channel} is followed no longer: ${error.message}`)
      for (const {refused} of told) this.#call(refused, error, channel)
      this.#drop(channel)
    }
  }

  // One page's mistake must not cost it the messages that follow.
  #call(callback, ...details) {
    if (this.#status === "closed") return
    try {
      callback(...details)
    } catch (error) {
      report(error)
    }
  }

  #tell(status, detail = {}) {
    if (this.#status === "closed" || this.#status === status && status !== "waiting") return
    if (this.onstatus && status !== "closed") this.#call(this.onstatus, status, detail)
    this.#status = status
    if (status === "closed") this.onstatus?.(status, detail)
  }
}
