/**
 * Follows channels of a tornjango site: one long-poll for all channels of the page, every message in order and once.
 *
 * In a module script of the page, import {Comet} from this file's static URL, then:
 *
 *   new Comet("/comet/", {cursor}).on("entry:7", (data, {channel, event}) => ..., {gap: () => location.reload()})
 *
 * `cursor` is what comet.cursor("entry:7") gave before the page's queries ran; without one, it starts when it connects.
 * `gap` is called when messages were lost that the page has not seen: fetch the state afresh.
 *
 * Events: "status" (detail: {status, delay, error}; status is "connecting", "open", "waiting", "failed" or "closed"),
 * "error" (detail: an Error with `status`; the server refused, and polling has stopped), "gap" (detail: {channel}).
 */

const FIRST_DELAY = 500
const LONGEST_DELAY = 30_000
const LONGEST_QUERY = 1500
const INTERRUPTED = new Error("interrupted")
// Statuses below 500 that pass by themselves.
const PASSING = [408, 425, 429]

export class Comet extends EventTarget {
  #url
  #cursor
  #timeout
  #followers = new Map()
  #lost = []
  #status = "connecting"
  #running = false
  #closed = false
  #listening = new AbortController()
  #interrupt = () => {}
  #awaken = () => {}

  constructor(base = "/comet/", {cursor = null, timeout = 60_000} = {}) {
    super()
    this.#url = new URL(base.replace(/\/*$/, "/poll/"), globalThis.location?.href)
    this.#cursor = cursor
    this.#timeout = timeout
    const options = {signal: this.#listening.signal}
    // A network that is back may have taken the parked poll with it; a page that is back only stops waiting.
    globalThis.addEventListener?.("online", () => this.#restart(), options)
    globalThis.addEventListener?.("focus", () => this.#awaken(), options)
    globalThis.addEventListener?.("visibilitychange", () => document.hidden || this.#awaken(), options)
  }

  get cursor() { return this.#cursor }
  get status() { return this.#status }

  on(channel, callback, {gap} = {}) {
    if (this.#closed) throw new Error("This Comet is closed; make a new one.")
    const followers = this.#followers.get(channel)
    this.#followers.set(channel, [...(followers ?? []), {callback, gap}])
    if (!followers) this.#start()
    return this
  }

  off(channel, callback) {
    const left = (this.#followers.get(channel) ?? []).filter(follower => callback && follower.callback !== callback)
    if (left.length) this.#followers.set(channel, left)
    else if (this.#followers.delete(channel)) this.#restart()
    return this
  }

  close() {
    this.#closed = true
    this.#listening.abort()
    this.#restart()
    this.#tell("closed")
  }

  // Whatever is followed in the same turn of the page goes into the same poll.
  #start() {
    queueMicrotask(() => {
      if (this.#running) this.#restart()
      else this.#run()
    })
  }

  // Gives up the present poll or pause; the cursor is still ours, so nothing is lost.
  #restart() {
    this.#interrupt()
    this.#awaken()
  }

  async #run() {
    this.#running = true
    try {
      await this.#follow()
    } finally {
      this.#running = false
    }
  }

  async #follow() {
    let failures = 0
    while (this.#followers.size && !this.#closed) {
      let delay
      try {
        const answer = await this.#poll()
        failures = 0
        this.#tell("open")
        this.#deliver(answer)
        this.#cursor = answer.cursor
        delay = answer.retry
      } catch (error) {
        if (error === INTERRUPTED) continue
        if (error.fatal) return this.#fail(error)
        // Full jitter, so that readers that lost a server together do not come back together.
        delay = (error.retryAfter ?? 0) + Math.random() * Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** failures++)
        this.#tell("waiting", {delay, error})
      }
      if (delay) await this.#pause(delay)
    }
  }

  async #poll() {
    const controller = new AbortController()
    const timer = setTimeout(() => controller.abort(new Error("the poll was not answered")), this.#timeout)
    this.#interrupt = () => controller.abort(INTERRUPTED)
    try {
      const response = await fetch(...this.#request(controller.signal))
      return response.ok ? await response.json() : await this.#refused(response)
    } finally {
      clearTimeout(timer)
      this.#interrupt = () => {}
    }
  }

  #request(signal) {
    const query = new URLSearchParams([...this.#followers.keys()].map(channel => ["channel", channel]))
    if (this.#cursor) query.set("cursor", this.#cursor)
    const options = {signal, cache: "no-store", headers: {Accept: "application/json"}}
    if (`${query}`.length > LONGEST_QUERY) return [this.#url, {...options, method: "POST", body: query}]
    return [`${this.#url}?${query}`, options]
  }

  async #refused(response) {
    const status = response.status
    const body = await response.json().catch(() => ({}))
    if (status === 400 && this.#cursor) {
      // A cursor of another time (a changed secret key): begin anew, and say so once there is a new one.
      this.#cursor = null
      this.#lost = [...this.#followers.keys()]
      return this.#poll()
    }
    throw Object.assign(new Error(body.error ?? `${status} ${response.statusText}`), {
      status,
      fatal: status < 500 && !PASSING.includes(status),
      retryAfter: milliseconds(response.headers.get("Retry-After")),
    })
  }

  #deliver({messages, gaps}) {
    for (const channel of [...gaps, ...this.#lost.splice(0)]) {
      const told = (this.#followers.get(channel) ?? []).filter(({gap}) => gap)
      if (!told.length) console.warn(`comet: messages of ${channel} were lost, and no gap callback is there`)
      for (const {gap} of told) this.#call(gap, channel)
      this.dispatchEvent(new CustomEvent("gap", {detail: {channel}}))
    }
    for (const {channel, event, data} of messages)
      for (const {callback} of this.#followers.get(channel) ?? []) this.#call(callback, data, {channel, event})
  }

  // One page's mistake must not cost it the messages that follow.
  #call(callback, ...args) {
    if (this.#closed) return
    try {
      callback(...args)
    } catch (error) {
      globalThis.reportError ? reportError(error) : console.error(error)
    }
  }

  #pause(delay) {
    return new Promise(resolve => {
      const timer = setTimeout(resolve, delay)
      this.#awaken = () => { clearTimeout(timer); resolve() }
    })
  }

  #fail(error) {
    console.error(`comet: polling has stopped: ${error.message}`)
    this.#tell("failed", {error})
    this.dispatchEvent(new CustomEvent("error", {detail: error}))
  }

  #tell(status, detail = {}) {
    if (this.#status === status && status !== "waiting" || this.#status === "closed") return
    this.#status = status
    this.dispatchEvent(new CustomEvent("status", {detail: {status, ...detail}}))
  }
}

// Retry-After is in seconds, or a date.
function milliseconds(retryAfter) {
  if (!retryAfter) return 0
  const seconds = Number(retryAfter)
  return Number.isNaN(seconds) ? Math.max(0, Date.parse(retryAfter) - Date.now()) || 0 : seconds * 1000
}
