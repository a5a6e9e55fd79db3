// The Live View's screen: pictures, one line of figures, a window of its own, an address for OBS.

const SIZE = 220
const MARGINS = 20 // px that the canvas leaves around a widget, of its height

const figure = (value, digits = 0) => (value == null ? '-' : value.toFixed(digits))

/** What the line below the picture is filled with. */
const figures = ({ fps, latency_ms, skipped, dropped }) => ({
  fps: figure(fps, 1), latency: figure(latency_ms?.p50), skipped, dropped
})

/** What is said of a view's track. */
const linked = ({ mbps, up, trip }) => ({
  down: figure(mbps, 2), up: figure(up, 2), trip: figure(trip)
})

export class View {
  #session = null
  #id = null
  #popup = null
  #window = null
  #mjpeg = null
  #whep = null

  /**
   * @param node a LiveView
   * @param tools say(key, values), element(), addStyle(document), notify(severity, summary,
   *   detail), id(node) as the server knows it, Compare, Picture, Screen
   */
  constructor(node, tools) {
    const { say, element } = tools
    this.node = node
    this.tools = tools
    this.hint = element('div', { className: 'livediffusion-hint' })
    this.note = element('div', { className: 'livediffusion-note' })
    const watch = { others: () => this.#windows, changed: () => this.#remark() }
    this.picture = new tools.Picture(node, tools, watch)
    this.hint.textContent = say('pressLive')
    this.picture.screen.root.append(this.note, this.hint)
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
      onclick: ({ shiftKey }) => this.copy(shiftKey)
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
    const box = element('div', { className: 'livediffusion-box' }, this.picture.screen.root, line)
    // the first Nodes 2.0 gave a widget no more height than its contents need
    box.style.minHeight = `${SIZE - MARGINS}px`
    this.widget = node.addDOMWidget('livediffusion_view', 'livediffusion.view', box, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => SIZE
    })
    this.widget.serialize = false
    this.widget.label = say('picture')
  }

  get compare() {
    return this.picture.compare
  }

  /** Show what a session sends for this node. */
  attach(session, place) {
    if (this.#session === session && this.index === place.index) return
    this.#session = session
    this.#id = place.node
    this.picture.attach(session, place.index)
    this.#mjpeg = place.mjpeg
    this.#whep = place.whep
    const tips = ['copyUrlTip', ...(place.whep ? ['copyWhepTip'] : [])]
    this.copyButton.title = tips.map((tip) => this.#say(tip)).join('\n')
    this.copyButton.disabled = false
    this.#savable(true)
    if (!this.picture.canvas.dataset.source) this.hint.textContent = this.#say('firstPicture')
  }

  detach() {
    if (!this.#session) return
    this.#session = null
    this.#savable(false)
    this.picture.detach()
    if (!this.picture.begun) this.hint.textContent = this.#say('pressLive')
  }

  get index() {
    return this.picture.index
  }

  stats(stats) {
    const sampled = ({ road, why }) => this.#say('sampled', { road }) + (why ? ` (${why})` : '')
    const link = this.#session?.rtc?.figures(this.index)
    this.line.textContent = [
      this.#say('figures', figures(stats)),
      ...(link ? [this.#say('linkFigures', linked(link))] : [])
    ].join(', ')
    this.line.title = [
      this.#say('figuresTip', stats),
      ...(stats.roads ?? []).map(sampled)
    ].join('; ')
  }

  #say = (key, values) => this.tools.say(key, values)

  /** A picture has come. */
  take(picture) {
    this.hint.textContent = ''
    this.picture.take(picture)
  }

  /** Its window of its own; null where there is none. */
  get popup() {
    return this.#popup
  }

  get #windows() {
    const page = pageOf(this.#popup)
    if (!page) this.#popup = this.#window = null
    // a reload leaves it empty
    else if (this.#window.root.ownerDocument !== page) this.#show(this.#popup)
    return this.#window ? [this.#window] : []
  }

  /** Hand over its window, as {popup, screen}, for the View that comes in its place; or null. */
  release() {
    const [screen] = this.#windows
    const popup = this.#popup
    this.#popup = this.#window = null
    return screen ? { popup, screen } : null
  }

  /** Take a window over; what it shows stays till the next picture. */
  adopt({ popup, screen }) {
    this.#fill(popup)
    this.#window.paint(screen.output, screen.compared ? screen.input : null)
  }

  #remark() {
    const lacking = this.picture.lacking && !this.#session && !this.hint.textContent
    const text = lacking ? this.#say('inputUnknown') : ''
    if (this.note.textContent !== text) this.note.textContent = text
  }

  /** The last picture of an ordinary prompt. */
  async still(url) {
    const reply = await fetch(url)
    if (!reply.ok) return
    const bitmap = await createImageBitmap(await reply.blob())
    this.hint.textContent = ''
    this.picture.paint(bitmap)
    bitmap.close()
  }

  popOut() {
    if (this.#windows.length) return this.#popup.focus()
    const name = `livediffusion-${this.tools.id(this.node)}`
    const popup = window.open('', name, 'popup,width=640,height=640')
    if (!pageOf(popup)) {
      return this.tools.notify('warn', this.#say('LiveView'), this.#say('windowBlocked'))
    }
    this.#show(popup)
  }

  #show(popup) {
    this.#fill(popup)
    if (!this.picture.begun) return
    const { screen, canvas } = this.picture
    this.#window.paint(canvas, screen.compared ? screen.input : null)
  }

  #fill(popup) {
    this.#popup = popup
    this.#window = new this.tools.Screen(this.tools, this.compare)
    const { root } = this.#window
    const { document: page } = popup
    this.tools.addStyle(page)
    page.title = this.#say('LiveView')
    page.body.style.cssText = 'margin:0;background:#000;overflow:hidden'
    root.classList.add('livediffusion-window')
    page.body.replaceChildren(root)
    // the whole page, as what is in it may be exchanged meanwhile
    root.ondblclick = () =>
      page.fullscreenElement ? page.exitFullscreen() : page.documentElement.requestFullscreen()
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

  /** @param whep the address for players of WebRTC, where there is one, and not the MJPEG stream */
  async copy(whep = false) {
    const path = (whep && this.#whep) || this.#mjpeg
    const url = new URL(this.tools.apiURL(path), location.href).href
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
    this.detach()
    this.picture.remove()
    this.closeWindow()
  }
}

/** The page in a window; null where there is none, or one that nobody here may look at. */
function pageOf(popup) {
  try {
    return (popup && !popup.closed && popup.document?.body && popup.document) || null
  } catch {
    return null
  }
}
