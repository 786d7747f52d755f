// Run by test_comet_client.py under Node, with the client's module in COMET_JS: real HTTP, no browser.
import assert from "node:assert/strict"
import http from "node:http"
import {once} from "node:events"
import {afterEach, beforeEach, test} from "node:test"

const {Comet} = await import(process.env.COMET_JS)

let server, base, polls, comet, waiting, told, listeners

// What the client hears of its page.
const page = new EventTarget()
globalThis.addEventListener = page.addEventListener.bind(page)
globalThis.document = {hidden: false}

// Every poll is put before the test, which answers it by hand.
beforeEach(async () => {
  polls = []
  told = []
  listeners = new Set()
  waiting = []
  Math.random = () => 0
  server = http.createServer((request, response) => {
    let body = ""
    request.on("data", chunk => { body += chunk })
    request.on("end", () => {
      const asked = new URLSearchParams(body || request.url.split("?")[1])
      const poll = {request, response, channels: asked.getAll("channel"), cursor: asked.get("cursor"), wait: asked.get("wait")}
      poll.left = once(response, "close").then(() => !response.writableEnded)
      const next = waiting.shift()
      if (next) next(poll)
      else polls.push(poll)
    })
  })
  server.listen(0, "127.0.0.1")
  await once(server, "listening")
  base = `http://127.0.0.1:${server.address().port}/comet/`
  comet = new Comet(base, {cursor: "start", transports: ["poll"]})
  comet.onstatus = (status, detail) => {
    told.push({status, ...detail})
    for (const listener of [...listeners]) listener({status, ...detail})
  }
})

afterEach(async () => {
  comet.close()
  server.closeAllConnections()
  server.close()
  await once(server, "close")
})

const nextPoll = () => polls.length ? Promise.resolve(polls.shift()) : new Promise(resolve => waiting.push(resolve))
const status = holds => new Promise(resolve => {
  const listener = detail => {
    if (!holds(detail)) return
    listeners.delete(listener)
    resolve(detail)
  }
  listeners.add(listener)
})

function answer(poll, {messages = [], cursor = "next", gaps = [], more = false, retry = 0, ...places} = {}) {
  const at = Object.fromEntries(poll.channels.map(channel => [channel, 0]))
  poll.response.setHeader("Content-Type", "application/json")
  poll.response.end(JSON.stringify({messages, cursor, gaps, more, retry, at, epoch: "e", ...places}))
}

function refuse(poll, status, error, headers = {}) {
  poll.response.writeHead(status, headers)
  poll.response.end(JSON.stringify({error}))
}

// A request of the test's own overtakes no poll that is under way: nothing else was sent before it.
async function nothingIsAsked() {
  const marker = fetch(`${base}marker`)
  const first = await nextPoll()
  assert.equal(first.request.url, "/comet/marker")
  first.response.end()
  await marker
}

const message = (channel, data, event = null) => ({channel, event, data})

test("one poll asks for all channels followed in the same turn, with the page's cursor", async () => {
  comet.on("a:1", () => {}).on("b:2", () => {})
  const poll = await nextPoll()
  assert.equal(poll.request.method, "GET")
  assert.match(poll.request.url, /^\/comet\/poll\/\?/)
  assert.deepEqual(poll.channels, ["a:1", "b:2"])
  assert.equal(poll.cursor, "start")
})

test("messages reach their channel's callbacks in order, and the next poll has the new cursor", async () => {
  const seen = []
  comet.on("a", (data, meta) => seen.push([data, meta.channel, meta.event]))
  comet.on("b", data => seen.push([data]))
  answer(await nextPoll(), {messages: [message("a", 1, "new"), message("b", 2), message("a", 3)]})
  assert.equal((await nextPoll()).cursor, "next")
  assert.deepEqual(seen, [[1, "a", "new"], [2], [3, "a", null]])
  assert.equal(comet.cursor, "next")
})

test("a callback that throws is reported and stops nothing", async () => {
  const seen = []
  const reported = []
  globalThis.reportError = error => reported.push(error.message)
  comet.on("a", data => { if (data === 1) throw new Error("mine"); seen.push(data) })
  answer(await nextPoll(), {messages: [message("a", 1), message("a", 2)]})
  assert.equal((await nextPoll()).cursor, "next")
  assert.deepEqual(seen, [2])
  assert.deepEqual(reported, ["mine"])
  delete globalThis.reportError
})

test("a gap is told before the messages that follow it", async () => {
  const seen = []
  comet.on("a", data => seen.push(data), {gap: channel => seen.push(`gap in ${channel}`)})
  answer(await nextPoll(), {gaps: ["a"], messages: [message("a", 9)]})
  await nextPoll()
  assert.deepEqual(seen, ["gap in a", 9])
})

test("a lost answer is asked for again with the same cursor", async () => {
  comet.on("a", () => {})
  const lost = await nextPoll()
  lost.response.writeHead(200, {"Content-Length": "1000"})
  lost.response.write('{"messages":[{"channel":"a","event":null,"data":1}')
  setImmediate(() => lost.response.destroy())
  assert.equal((await nextPoll()).cursor, "start")
})

test("a server in trouble is asked again after the time it gave", async () => {
  const waits = status(detail => detail.status === "waiting")
  comet.on("a", () => {})
  refuse(await nextPoll(), 503, "Full", {"Retry-After": "7"})
  const detail = await waits
  assert.equal(detail.delay, 7000)
  assert.equal(detail.error.message, "Full")
})

test("the pauses between failed polls grow, at random, up to half a minute; focus ends one", async () => {
  Math.random = () => 1
  const pauses = []
  comet.onstatus = (status, {delay}) => {
    if (status !== "waiting") return
    pauses.push(delay)
    setImmediate(() => page.dispatchEvent(new Event("focus")))
  }
  comet.on("a", () => {})
  for (let failure = 0; failure < 9; failure++) refuse(await nextPoll(), 500, "Broken")
  answer(await nextPoll())
  refuse(await nextPoll(), 500, "Broken")
  await nextPoll()
  assert.deepEqual(pauses, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000, 500])
})

test("a network that is back replaces the parked poll", async () => {
  comet.on("a", () => {})
  const parked = await nextPoll()
  page.dispatchEvent(new Event("online"))
  assert.equal((await nextPoll()).cursor, "start")
  assert.equal(await parked.left, true)
})

test("a page that is back keeps its parked poll", async () => {
  comet.on("a", () => {})
  const parked = await nextPoll()
  page.dispatchEvent(new Event("focus"))
  page.dispatchEvent(new Event("visibilitychange"))
  await nothingIsAsked()
  answer(parked)
  assert.equal((await nextPoll()).cursor, "next")
})

test("a draining server's retry is waited for, unless the page comes back", async () => {
  const opened = status(detail => detail.status === "open")
  comet.on("a", () => {})
  answer(await nextPoll(), {retry: 1_000_000})
  await opened
  await nothingIsAsked()
  page.dispatchEvent(new Event("visibilitychange"))
  assert.equal((await nextPoll()).cursor, "next")
})

test("a second callback for a channel needs no other poll", async () => {
  const seen = []
  comet.on("a", data => seen.push(["first", data]))
  const parked = await nextPoll()
  comet.on("a", data => seen.push(["second", data]))
  await nothingIsAsked()
  answer(parked, {messages: [message("a", 1)]})
  await nextPoll()
  assert.deepEqual(seen, [["first", 1], ["second", 1]])
})

test("a draining server's retry is waited for, and not taken for a failure", async () => {
  comet.on("a", () => {})
  answer(await nextPoll(), {retry: 1})
  assert.equal((await nextPoll()).cursor, "next")
  assert.deepEqual(told, [{status: "open", error: null}, {status: "waiting", delay: 1, error: null}])
})

for (const code of [401, 403, 404]) {
  test(`an answer of ${code} ends a channel, and is told`, async () => {
    const refused = []
    comet.on("a", () => assert.fail("nothing was published"), {refused: (error, channel) => refused.push([channel, error.status, error.message])})
    refuse(await nextPoll(), code, "No.")
    const again = await nextPoll()
    assert.equal(again.wait, "0")
    refuse(again, code, "No.")
    refuse(await nextPoll(), code, "No.")
    await nothingIsAsked()
    assert.deepEqual(refused, [["a", code, "No."]])
  })
}

test("of several channels those go on that are not refused", async () => {
  const seen = []
  comet.on("a", () => assert.fail("nothing was published"), {refused: (error, channel) => seen.push(`${channel} refused`)})
  comet.on("b", data => seen.push(data))
  refuse(await nextPoll(), 403, "No.")
  refuse(await nextPoll(), 403, "No.")
  for (let poll; (poll = await nextPoll());) {
    if (!poll.wait) {
      assert.deepEqual(poll.channels, ["b"])
      assert.equal(poll.cursor, "start")
      answer(poll, {messages: [message("b", 1)]})
      break
    }
    if (poll.channels[0] === "a") refuse(poll, 403, "No.")
    else answer(poll)
  }
  await nextPoll()
  assert.deepEqual(seen, ["a refused", 1])
})

test("a cursor that is no longer good is given up, and the gap is told once there is a new one", async () => {
  const gaps = []
  comet.on("a", () => {}, {gap: channel => gaps.push([channel, comet.status])})
  for (let n = 0; n < 3; n++) refuse(await nextPoll(), 400, "The cursor is not one of this site.")
  const fresh = await nextPoll()
  assert.equal(fresh.cursor, null)
  assert.deepEqual(gaps, [])
  // The gap outlives a failure in between.
  refuse(fresh, 500, "Broken")
  answer(await nextPoll(), {cursor: "new"})
  assert.equal((await nextPoll()).cursor, "new")
  assert.deepEqual(gaps, [["a", "open"]])
})

test("following another channel gives up the parked poll for one that asks for both", async () => {
  comet.on("a", () => {})
  const parked = await nextPoll()
  comet.on("b", () => {})
  const both = await nextPoll()
  assert.equal(await parked.left, true)
  assert.deepEqual(both.channels, ["a", "b"])
  assert.deepEqual(told, [])
  assert.equal(both.cursor, "start")
})

test("a channel no longer followed is no longer asked for", async () => {
  const callback = () => assert.fail("it was taken off")
  comet.on("a", callback).on("b", () => {})
  await nextPoll()
  comet.off("a", callback)
  assert.deepEqual((await nextPoll()).channels, ["b"])
  comet.off("b").on("c", () => {})
  assert.deepEqual((await nextPoll()).channels, ["c"])
})

test("closing gives up the parked poll, delivers nothing more and polls no more", async () => {
  const seen = []
  const closed = status(detail => detail.status === "closed")
  comet.on("a", data => { seen.push(data); comet.close() })
  answer(await nextPoll(), {messages: [message("a", 1), message("a", 2)]})
  await closed
  assert.deepEqual(seen, [1])
  assert.equal(comet.status, "closed")
  assert.throws(() => comet.on("b", () => {}), /closed/)
  assert.equal(polls.length, 0)
})

test("closing while a poll is parked hangs up", async () => {
  comet.on("a", () => {})
  const parked = await nextPoll()
  comet.close()
  assert.equal(await parked.left, true)
})

test("a long list of channels is posted", async () => {
  const channels = Array.from({length: 32}, (_, n) => `${"room".repeat(20)}:${n}`)
  for (const channel of channels) comet.on(channel, () => {})
  const poll = await nextPoll()
  assert.equal(poll.request.method, "POST")
  assert.deepEqual(poll.channels, channels)
})

test("a poll that is never answered is given up in time", async () => {
  comet.close()
  comet = new Comet(base, {cursor: "start", timeout: 30, transports: ["poll"]})
  comet.on("a", () => {})
  const silent = await nextPoll()
  assert.equal((await nextPoll()).cursor, "start")
  assert.equal(await silent.left, true)
})

// A log that answers polls by itself: its cursors are offsets.
function keepLog() {
  const log = []
  const give = poll => {
    const since = Number(poll.cursor ?? log.length)
    const news = log.filter(({offset, channel}) => offset > since && poll.channels.includes(channel))
    const at = Object.fromEntries(poll.channels.map(channel => [channel, log.length]))
    const messages = news.map(({channel, data}) => message(channel, data))
    answer(poll, {messages, offsets: news.map(({offset}) => offset), at, epoch: "e", cursor: `${log.length}`})
  }
  return {give, publish: (channel, data) => log.push({channel, data, offset: log.length + 1})}
}

test("a channel that is followed later begins where the page has, and all come in order and once", async () => {
  const {give, publish} = keepLog()
  const seen = {a: [], b: []}
  let finish
  const all = new Promise(resolve => { finish = resolve })
  const note = (channel, data) => { if (seen[channel].push(data) === 155 && seen.a.length === seen.b.length) finish(null) }
  comet.close()
  comet = new Comet(base, {cursor: "0", transports: ["poll"]})
  for (let n = 0; n < 5; n++) { publish("a", n); publish("b", n) }
  comet.on("a", data => note("a", data))
  give(await nextPoll())
  await nextPoll()
  comet.on("b", data => note("b", data))
  give(await nextPoll())
  // The new channel is caught up with beside the connection, which goes on: more than may wait for it.
  let late
  for (let n = 5; n < 155; n++) {
    publish("a", n)
    publish("b", n)
    let poll = await nextPoll()
    if (poll.wait) { late = poll; poll = await nextPoll() }
    give(poll)
  }
  assert.equal(late.cursor, "0")
  assert.deepEqual(late.channels, ["b"])
  assert.deepEqual(seen.b, [])
  give(late)
  for (let poll; (poll = await Promise.race([all, nextPoll()]));) if (poll.wait) give(poll)
  const numbers = Array.from({length: 155}, (_, n) => n)
  assert.deepEqual(seen, {a: numbers, b: numbers})
})

test("a better transport is tried again after a while, and later each time", async () => {
  const now = Date.now
  let later = 0
  Date.now = () => now() + later
  try {
    comet.close()
    comet = new Comet(base, {transports: ["sse", "poll"]})
    comet.on("a", () => {})
    for (const pause of [10_000, 20_000, 40_000]) {
      const stream = await nextPoll()
      assert.match(stream.request.url, /sse/)
      refuse(stream, 404, "No.")
      answer(await nextPoll())
      for (const passes of [pause - 1000, 2000]) {
        const poll = await nextPoll()
        assert.match(poll.request.url, /poll/)
        later += passes
        answer(poll)
      }
    }
    assert.match((await nextPoll()).request.url, /sse/)
    assert.equal(comet.diagnostics().transport, null)
  } finally {
    Date.now = now
  }
})
