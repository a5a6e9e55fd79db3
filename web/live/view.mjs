// The Live View's screen: pictures, one line of figures, a window of its own, an address for OBS.

const SIZE = 220
const MARGINS = 20 // px that the canvas leaves around a widget, of its height

const OFF = 'off'
const figure = (value, digits = 0) => (value == null ? '-' : value.toFixed(digits))

/** What the line below the picture is filled with. */
const figures = ({ fps, latency_ms, skipped, dropped }) => ({
  fps: figure(fps, 1), latency: figure(latency_ms?.p50), skipped, dropped
})

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
   * @param tools say(key, values), element(), addStyle(document), notify(severity, summary,
   *   detail), Compare, Screen
   */
  constructor(node, tools) {
    const { say, element, Compare, Screen } = tools
    this.node = node
    this.tools = tools
    this.compare = new Compare(node, tools, () => this.#compared())
    this.screen = new Screen(tools, this.compare)
    this.canvas = this.screen.output
    this.hint = element('div', { className: 'livediffusion-hint' })
    this.hint.textContent = say('pressLive')
    this.note = element('div', { className: 'livediffusion-note' })
    this.screen.root.append(this.note, this.hint)
    this.line = element('span', { className: 'livediffusion-figures' })
    this.popButton = element('button', {
      textContent: say('window'),
      title: say('windowTip'),
      onclick: () => this.popOut()
    })
    this.copyButton = element('button', {
      textContent: say('copyUrl'),
      title: say('copyUrlTip'),
      disabled: true,
      onclick: () => this.copy()
    })
    this.saveButton = element('button', {
      textContent: say('snapshot'),
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
    this.widget.label = say('picture')
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
    if (!this.canvas.dataset.source) this.hint.textContent = this.#say('firstPicture')
  }

  detach() {
    if (!this.#session) return
    // the run may go on, with another node in this one's place after an undo
    if (this.#wished) this.#session.compare(this.#place, (this.#wished = false))
    this.#session = this.#place = null
    this.#savable(false)
    for (const picture of this.#waiting.splice(0)) close(picture)
    this.#remark()
    if (this.canvas.dataset.frames === '0') this.hint.textContent = this.#say('pressLive')
  }

  get index() {
    return this.#place
  }

  stats(stats) {
    const sampled = ({ road, why }) => this.#say('sampled', { road }) + (why ? ` (${why})` : '')
    this.line.textContent = this.#say('figures', figures(stats))
    this.line.title = [
      this.#say('figuresTip', stats),
      ...(stats.roads ?? []).map(sampled)
    ].join('; ')
  }

  #say = (key, values) => this.tools.say(key, values)

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
    const text = lacking && !this.#session && !this.hint.textContent ? this.#say('inputUnknown') : ''
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
      return this.tools.notify('warn', this.#say('LiveView'), this.#say('windowBlocked'))
    }
    this.#popup = popup
    this.#window = new this.tools.Screen(this.tools, this.compare)
    const { root } = this.#window
    const { document: page } = popup
    this.tools.addStyle(page)
    page.title = this.#say('LiveView')
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
    this.saveButton.title = this.#say(on ? 'snapshotTip' : 'snapshotOffTip')
  }

  /** Write the picture of this moment to a file. */
  async save() {
    if (!this.#session) return
    try {
      this.tools.notify('success', this.#say('snapshot'), await this.#session.save(this.#id))
    } catch (error) {
      this.tools.notify('error', this.#say('snapshot'), error.message)
    }
  }

  async copy() {
    const url = new URL(this.tools.apiURL(this.#mjpeg), location.href).href
    try {
      await navigator.clipboard.writeText(url)
      this.tools.notify('success', this.#say('addressCopied'), url)
    } catch {
      // without https or localhost there is no clipboard: show it to be copied by hand
      this.tools.notify('info', this.#say('address'), url)
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
