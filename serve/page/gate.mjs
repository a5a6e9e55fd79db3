// How a page reaches a gate: by its own address, or through the house.

const PATIENCE = 2000 // ms for a gate's own address to answer at all
const ASKED = 35000 // ms for an answer: a gate gives ComfyUI 30 s, see serve/gate/stream.py

/**
 * The addresses of a place, the better first.
 *
 * @param go what the house said: direct, relay
 * @param kept remembers that gates' own addresses do not answer here
 * @param house the house's own address
 */
export function ways(go, kept, house) {
  // the house may be below a path
  const relay = new URL(go.relay.replace(/^\//, ''), house).href
  const own = go.direct && !kept.get('relayed') && !mixed(go.direct, house)
  return own ? [go.direct.replace(/\/$/, ''), relay] : [relay]
}

/** A page that came by https may not speak http to another machine. */
function mixed(address, house) {
  const { protocol, hostname } = new URL(address)
  const near = ['localhost', '127.0.0.1', '[::1]'].includes(hostname)
  return new URL(house).protocol === 'https:' && protocol === 'http:' && !near
}

/** Whether anything answers at a gate's address, whatever it says. */
export async function answers(address, ticket) {
  try {
    const url = `${address}/livediffusion/stats?${new URLSearchParams({ ticket })}`
    await fetch(url, { signal: AbortSignal.timeout(PATIENCE), referrerPolicy: 'no-referrer' })
    return true
  } catch {
    return false
  }
}

/** What session.mjs asks ComfyUI for, asked of a gate. */
export class Gate {
  #base

  /**
   * @param base the gate's address, without a slash at its end
   * @param ticket opens this one stream there; may be set anew
   * @param clientId of this page
   */
  constructor(base, ticket, clientId) {
    this.#base = base
    this.ticket = ticket
    this.clientId = clientId
  }

  apiURL = (path) => {
    const url = new URL(this.#base + path)
    url.searchParams.set('ticket', this.ticket)
    return url.href
  }

  fetchApi = (path, options) => {
    const signal = AbortSignal.timeout(ASKED)
    return fetch(this.apiURL(path), { signal, ...options, cache: 'no-store' })
  }
}
