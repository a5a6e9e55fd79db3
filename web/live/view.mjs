// The Live View's screen: pictures, one line of figures, a window of its own, an address for OBS.

const IDLE = 'Press Live'
const SIZE = 220
const MARGINS = 20 // px that the canvas leaves around a widget, of its height

const figure = (value, digits = 0) => (value == null ? '-' : value.toFixed(digits))

/** What the line below the picture says. */
export function figures(stats) {
  const latency = stats.latency_ms?.p50
  return (
    `${figure(stats.fps, 1)} fps, ${figure(latency)} ms, ` +
    `${stats.skipped} skipped, ${stats.dropped} dropped`
  )
}

export class View {
  #session = null
  #place = null
  #waiting = []
  #drawing = 0
  #popup = null
  #mjpeg = null

  /**
   * @param node a LiveView
   * @param tools element(), notify(severity, summary, detail)
   */
  constructor(node, tools) {
    const { element } = tools
    this.node = node
    this.tools = tools
    this.canvas = element('canvas', { width: 512, height: 512 })
    this.hint = element('div', { className: 'livediffusion-hint', textContent: IDLE })
    this.line = element('span', { className: 'livediffusion-figures' })
    this.popButton = element('button', {
      textContent: 'Window',
      title: 'Show the pictures in a window of their own. Double click there for full screen.',
      onclick: () => this.popOut()
    })
    this.copyButton = element('button', {
      textContent: 'Copy URL',
      title: 'Copy the address of these pictures as an MJPEG stream, for OBS and browsers.',
      disabled: true,
      onclick: () => this.copy()
    })
    const screen = element('div', { className: 'livediffusion-screen' }, this.canvas, this.hint)
    const line = element(
      'div',
      { className: 'livediffusion-line' },
      this.line,
      this.popButton,
      this.copyButton
    )
    const box = element('div', { className: 'livediffusion-box' }, screen, line)
    // the first Nodes 2.0 gave a widget no more height than its contents need
    box.style.minHeight = `${SIZE - MARGINS}px`
    this.canvas.dataset.frames = 0
    this.widget = node.addDOMWidget('livediffusion_view', 'livediffusion.view', box, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => SIZE
    })
    this.widget.serialize = false
    document.addEventListener('visibilitychange', this.#hidden)
  }

  // what waits for a refresh that a hidden page does not get is drawn now
  #hidden = () => document.hidden && this.#draw()

  /** Show what a session sends for this node. */
  attach(session, place) {
    if (this.#session === session && this.#place === place.index) return
    this.#session = session
    this.#place = place.index
    this.#mjpeg = place.mjpeg
    this.copyButton.disabled = false
    if (!this.canvas.dataset.source) this.hint.textContent = 'Waiting for the first picture'
  }

  detach() {
    if (!this.#session) return
    this.#session = this.#place = null
    for (const picture of this.#waiting.splice(0)) picture.bitmap.close()
    if (this.canvas.dataset.frames === '0') this.hint.textContent = IDLE
  }

  get index() {
    return this.#place
  }

  stats(stats) {
    this.line.textContent = figures(stats)
    this.line.title =
      `frames through the graph per second; from capture to here (median); ` +
      `${stats.frames} frames, ${stats.calls} UNet calls, ${stats.refused} refused` +
      (stats.roads ?? []).map(({ road, why }) => `; sampled ${road}${why ? ` (${why})` : ''}`).join('')
  }

  /** A picture has come: on the screen with its next refresh. */
  take(picture) {
    this.#waiting.push(picture)
    // a hidden page gets no refresh, but its window may be on a stage
    if (document.hidden) return this.#draw()
    this.#drawing ||= requestAnimationFrame(() => this.#draw())
  }

  #draw() {
    cancelAnimationFrame(this.#drawing)
    this.#drawing = 0
    const pictures = this.#waiting.splice(0)
    const newest = pictures.at(-1)
    if (!newest) return
    this.#paint(newest.bitmap)
    Object.assign(this.canvas.dataset, {
      frames: Number(this.canvas.dataset.frames) + 1,
      source: newest.source,
      seq: newest.seq,
      version: newest.version
    })
    for (const picture of pictures) {
      this.#session?.shown(picture)
      picture.bitmap.close()
    }
  }

  #paint(bitmap) {
    this.hint.textContent = ''
    this.#paintOn(this.canvas, bitmap)
    if (this.#popup?.closed) this.#popup = null
    const there = this.#popup?.document.querySelector('canvas')
    if (there) this.#paintOn(there, bitmap)
  }

  #paintOn(canvas, bitmap) {
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
      canvas.width = bitmap.width
      canvas.height = bitmap.height
    }
    canvas.getContext('2d').drawImage(bitmap, 0, 0)
  }

  /** The last picture of an ordinary prompt. */
  async still(url) {
    const reply = await fetch(url)
    if (!reply.ok) return
    const bitmap = await createImageBitmap(await reply.blob())
    this.#paint(bitmap)
    bitmap.close()
  }

  popOut() {
    if (this.#popup && !this.#popup.closed) return this.#popup.focus()
    const popup = window.open('', `livediffusion-${this.node.id}`, 'popup,width=640,height=640')
    if (!popup) {
      const detail = 'The browser blocked the window. Allow pop-ups for this page.'
      return this.tools.notify('warn', 'Live View', detail)
    }
    this.#popup = popup
    const { document: page } = popup
    page.title = 'Live View'
    page.body.style.cssText = 'margin:0;background:#000;overflow:hidden'
    const canvas = page.createElement('canvas')
    canvas.style.cssText = 'width:100vw;height:100vh;object-fit:contain;display:block'
    page.body.replaceChildren(canvas)
    canvas.ondblclick = () =>
      page.fullscreenElement ? page.exitFullscreen() : canvas.requestFullscreen()
    if (this.canvas.dataset.frames !== '0') this.#paintOn(canvas, this.canvas)
  }

  async copy() {
    const url = new URL(this.tools.apiURL(this.#mjpeg), location.href).href
    try {
      await navigator.clipboard.writeText(url)
      this.tools.notify('success', 'MJPEG address copied', url)
    } catch {
      // without https or localhost there is no clipboard: show it to be copied by hand
      this.tools.notify('info', 'MJPEG address', url)
    }
  }

  closeWindow() {
    this.#popup?.close()
    this.#popup = null
  }

  remove() {
    cancelAnimationFrame(this.#drawing)
    document.removeEventListener('visibilitychange', this.#hidden)
    this.detach()
    this.closeWindow()
  }
}
