/** "connecting", at first; "open": what is published comes; "waiting": until it tries again; "closed": by close(). */
export type Status = "connecting" | "open" | "waiting" | "closed"

export type Transport = "socket" | "sse" | "poll"

export interface Options {
  /** Where the page begins: what comet.cursor() gave before its queries ran. Without one, it begins when it connects. */
  cursor?: string | null
  /** An answer's grant, which spares the server's authoriser. */
  grant?: string | null
  /** Those to use, best first: ["socket", "sse", "poll"]. */
  transports?: Transport[]
  /** Whether all tabs of the browser share one connection, where it can: true. */
  shared?: boolean
  /** Milliseconds after which a silent connection is given up: 60000; more than the server's POLL_TIMEOUT and HEARTBEAT. */
  timeout?: number
  /** Where publish() finds its token: settings.CSRF_COOKIE_NAME. */
  csrfCookie?: string
}

export interface Meta {
  channel: string
  event: string | null
}

/** What the server has refused; `status` as HTTP has it. */
export interface Refusal {
  message: string
  status?: number
}

export interface FollowOptions {
  /** Messages were lost that this page has not seen: fetch the channel's state afresh. */
  gap?: (channel: string) => void
  /** The page may not follow the channel, or no longer; nothing comes any more. */
  refused?: (error: Refusal, channel: string) => void
  /** Only messages of this event. */
  event?: string
}

export interface Diagnostics {
  status: Status
  /** Of the connection, whichever tab has it; null while there is none. */
  transport: Transport | null
  /** Connections begun. */
  tries: number
  /** The last failure. */
  error: string | null
  /** Milliseconds from the stream's beginning to its first answer. */
  roundTrip: number | null
  /** Whether something on the way has held a stream back. */
  buffering: boolean
  /** How many share the connection. */
  tabs: number
  /** Whether it is this one's. */
  leads: boolean
}

/** Follows channels of a tornjango site: the messages of each in order, and once; or a gap is told. */
export class Comet {
  /** `url` is where the project has tornjango.comet.urls. Without it, the page's {% comet %} says where, and the cursor. */
  constructor(url?: string | null, options?: Options)

  /** Where this page is: to begin there with another Comet. */
  readonly cursor: string | null
  readonly status: Status
  onstatus: ((status: Status, detail: {delay?: number; error?: Refusal | null}) => void) | null

  /** Calls `callback` with what is published from now on, or from the page's cursor on. What it throws is reported. */
  on<Data = any>(channel: string, callback: (data: Data, meta: Meta) => void, options?: FollowOptions): this

  /** Calls `callback` no longer, or none of the channel's. */
  off(channel: string, callback?: (data: any, meta: Meta) => void): this

  /** Publishes where the channel lets browsers; the promise fails with a Refusal, or where the network does. */
  publish(channel: string, data: unknown, event?: string | null): Promise<void>

  diagnostics(): Diagnostics

  /** Calls nobody any more. */
  close(): void
}

declare global {
  interface Window {
    /** What comet.classic.js makes. */
    Comet: typeof Comet
  }
}
