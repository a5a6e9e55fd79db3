// The Live View's screen: pictures, one line of figures, a window of its own, an address for OBS.

const IDLE = 'Press Live'
const UNKNOWN = 'The input shows while live'
const SIZE = 220
const MARGINS = 20 // px that the canvas leaves around a widget, of its height

const OFF = 'off'
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
  #id = null
  #waiting = []
  #drawing = 0
  #popup = null
  #window = null
  #wished = false
  #last = null
  #mjpeg = null

  /**
   * @param node a LiveView
   * @param tools element(), addStyle(document), notify(severity, summary, detail), Compare, Screen
   */
  constructor(node, tools) {
    const { element, Compare, Screen } = tools
    this.node = node
    this.tools = tools
    this.compare = new Compare(node, element, () => this.#compared())
    this.screen = new Screen(element, this.compare)
    this.canvas = this.screen.output
    this.hint = element('div', { className: 'livediffusion-hint', textContent: IDLE })
    this.note = element('div', { className: 'livediffusion-note' })
    this.screen.root.append(this.note, this.hint)
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
    this.saveButton = element('button', {
      textContent: 'Snapshot',
      onclick: () => this.save()
    })
    this.#savable(false)
    const line = element(
      'div',
      { className: 'livediffusion-line' },
      this.line,
      element(
        'div',
        { className: 'livediffusion-tools' },
        this.compare.switch,
        this.saveButton,
        this.popButton,
        this.copyButton
      )
    )
    const box = element('div', { className: 'livediffusion-box' }, this.screen.root, line)
    // the first Nodes 2.0 gave a widget no more height than its contents need
    box.style.minHeight = `${SIZE - MARGINS}px`
    this.canvas.dataset.frames = 0
    this.widget = node.addDOMWidget('livediffusion_view', 'livediffusion.view', box, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => SIZE
    })
    this.widget.serialize = false
    this.widget.label = 'picture'
    document.addEventListener('visibilitychange', this.#hidden)
  }

  // what waits for a refresh that a hidden page does not get is drawn now
  #hidden = () => document.hidden && this.#draw()

  /** Show what a session sends for this node. */
  attach(session, place) {
    if (this.#session === session && this.#place === place.index) return
    this.#session = session
    this.#place = place.index
    this.#id = place.node
    this.#last = null
    this.#wished = false
    this.#wish()
    this.#mjpeg = place.mjpeg
    this.copyButton.disabled = false
    this.#savable(true)
    if (!this.canvas.dataset.source) this.hint.textContent = 'Waiting for the first picture'
  }

  detach() {
    if (!this.#session) return
    // the run may go on, with another node in this one's place after an undo
    if (this.#wished) this.#session.compare(this.#place, (this.#wished = false))
    this.#session = this.#place = null
    this.#savable(false)
    for (const picture of this.#waiting.splice(0)) close(picture)
    this.#remark()
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
    // one that comes again brings the input that it went without
    const last = this.#last
    const again = ({ seq }) => seq === last
    this.#last = newest.seq
    this.#paint(newest.bitmap, this.compare.mode === OFF ? null : newest.input)
    Object.assign(this.canvas.dataset, {
      frames: Number(this.canvas.dataset.frames) + !again(newest),
      source: newest.source,
      seq: newest.seq,
      version: newest.version
    })
    for (const picture of pictures) {
      this.#session?.shown(picture, again(picture))
      close(picture)
    }
  }

  #paint(bitmap, input) {
    this.hint.textContent = ''
    for (const screen of this.#screens) screen.paint(bitmap, input)
    this.#remark()
  }

  get #screens() {
    if (this.#popup?.closed) this.#popup = this.#window = null
    return this.#window ? [this.screen, this.#window] : [this.screen]
  }

  /** The user has chosen another way to compare, or moved the line. */
  #compared() {
    const off = this.compare.mode === OFF
    // inputs do not come any more: when they do again, this one is of another picture
    for (const screen of this.#screens) off ? screen.alone() : screen.refresh()
    this.#wish()
    this.#remark()
  }

  #wish() {
    const on = this.compare.mode !== OFF
    if (this.#session && on !== this.#wished) this.#session.compare(this.#place, (this.#wished = on))
  }

  #remark() {
    const lacking = this.compare.mode !== OFF && !this.screen.compared
    const text = lacking && !this.#session && !this.hint.textContent ? UNKNOWN : ''
    if (this.note.textContent !== text) this.note.textContent = text
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
    this.#window = new this.tools.Screen(this.tools.element, this.compare)
    const { root } = this.#window
    const { document: page } = popup
    this.tools.addStyle(page)
    page.title = 'Live View'
    page.body.style.cssText = 'margin:0;background:#000;overflow:hidden'
    root.classList.add('livediffusion-window')
    page.body.replaceChildren(root)
    root.ondblclick = () =>
      page.fullscreenElement ? page.exitFullscreen() : root.requestFullscreen()
    if (this.canvas.dataset.frames === '0') return
    this.#window.paint(this.canvas, this.screen.compared ? this.screen.input : null)
  }

  #savable(on) {
    this.saveButton.disabled = !on
    this.saveButton.title = on
      ? 'Write this picture, with the workflow in it, to the output folder as a PNG.'
      : 'While live only. To keep the pictures of an ordinary run, add a Save Image node.'
  }

  /** Write the picture of this moment to a file. */
  async save() {
    if (!this.#session) return
    try {
      this.tools.notify('success', 'Snapshot', await this.#session.save(this.#id))
    } catch (error) {
      this.tools.notify('error', 'Snapshot', error.message)
    }
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
    this.#popup = this.#window = null
  }

  remove() {
    cancelAnimationFrame(this.#drawing)
    document.removeEventListener('visibilitychange', this.#hidden)
    this.detach()
    this.closeWindow()
  }
}

function close(picture) {
  picture.bitmap.close()
  picture.input?.close()
}
