// The Live Camera's choices, what it sees or shows, and in a run how its source is.

const SIZE = 130
const MARGINS = 20 // px that the canvas leaves around a widget, of its height
const EVERY = 100 // ms between two pictures of the preview
const UNUSED = '' // words that are not said

// inputs that one source alone uses; the node shows those of the chosen one
const OWN = {
  file: ['file'], loop: ['file'], device: ['device'], address: ['address'],
  sender: ['ndi', 'spout', 'syphon']
}

export class Picker {
  #timer = 0
  #there = false
  #session = null
  #place = null
  #source = null
  #silent = false
  told = UNUSED // what is wrong, as the server says it

  /**
   * @param node a LiveCamera
   * @param captures {browser, screen}: see camera.mjs
   * @param tools say(key, values), element(), notify(severity, summary, detail), upload(file),
   *   ask(route, body), url(path), panels: see panels.mjs
   */
  constructor(node, captures, tools) {
    const { say, element } = tools
    this.node = node
    this.captures = captures
    this.tools = tools
    this.canvas = element('canvas', { width: 320, height: 180 })
    this.hint = element('div', { className: 'livediffusion-hint' })
    this.note = element('div', { className: 'livediffusion-rate' })
    this.qr = element('img', {
      className: 'livediffusion-qr', hidden: true, alt: say('phoneCode'),
      title: say('phoneCode'), onclick: () => this.#enlarge()
    })
    this.allow = new tools.Allow(
      say('LiveCamera'), tools, () => this.#allowing(), (address) => this.#given(address)
    )
    this.panels = tools.panels(this)
    this.line = element('div', { className: 'livediffusion-line' })
    const screen = element(
      'div', { className: 'livediffusion-screen' }, this.canvas, this.qr, this.note, this.hint
    )
    const box = element('div', { className: 'livediffusion-box' }, this.line, screen)
    // the first Nodes 2.0 gave a widget no more height than its contents need
    box.style.minHeight = `${SIZE - MARGINS}px`
    this.widget = node.addDOMWidget('livediffusion_camera', 'livediffusion.camera', box, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => SIZE,
      getMaxHeight: () => SIZE * 2
    })
    this.widget.serialize = false
    this.widget.label = say('cameraWidget')
    const { source } = this.widgets
    const changed = source.callback
    source.callback = (...values) => {
      changed?.apply(source, values)
      this.show()
    }
  }

  /** Its node is in the graph, until remove(). Many are made only to be written down, as by a copy. */
  begin() {
    this.#there = true
    for (const capture of Object.values(this.captures))
      for (const event of ['opened', 'closed']) capture.addEventListener(event, this.#changed)
    for (const panel of Object.values(this.panels)) panel.begin?.()
    this.show()
  }

  /** What the node's source is. */
  get source() {
    return this.widgets.source?.value ?? 'browser'
  }

  get panel() {
    return this.panels[this.source] ?? this.panels.browser
  }

  /** What it looks through in this browser; null for a source that is elsewhere. */
  get capture() {
    return this.panel.capture ?? null
  }

  get widgets() {
    return Object.fromEntries((this.node.widgets ?? []).map((w) => [w.name, w]))
  }

  /** {width, height, fps} that the node says; an input that is wired says none. */
  get wish() {
    const { width, height, fps } = this.widgets
    return { width: width?.value, height: height?.value, fps: fps?.value }
  }

  /** Set an input, as its user would. */
  set(input, value) {
    const widget = this.widgets[input]
    widget.value = value
    widget.callback?.(value)
    document.dispatchEvent(new Event('change'))
  }

  /** What belongs to the chosen source. */
  show() {
    if (!this.#there) return
    const other = this.#source !== this.source
    if (other) {
      for (const [name, capture] of Object.entries(this.captures))
        if (name !== this.source && capture.users.has(this)) capture.leave(this)
      this.#source = this.source
      this.told = UNUSED
      this.code(null)
      this.allow.set(null)
      this.line.replaceChildren(...this.panel.parts, this.allow.button)
      this.#own()
      this.panel.show?.()
    }
    this.#changed()
  }

  // inputs that are wired stay, or nobody could unplug them
  #own() {
    const wired = new Set((this.node.inputs ?? []).filter(({ link }) => link != null).map((i) => i.name))
    for (const [name, of] of Object.entries(OWN)) {
      const widget = this.widgets[name]
      if (!widget) continue
      const hidden = !of.includes(this.source) && !wired.has(name)
      widget.hidden = hidden
      // Nodes 2.0
      if (widget.options) widget.options.hidden = hidden
    }
    this.node.setDirtyCanvas?.(true, true)
  }

  get #trying() {
    return this.capture?.users.has(this) ?? false
  }

  async toggle() {
    const { capture } = this
    try {
      if (this.#trying) capture.leave(this)
      else await capture.use(this, [this.wish])
    } catch (error) {
      this.tools.notify('error', this.tools.say('camera'), error.message)
    }
    this.#changed()
  }

  // something opened or closed, or another source was chosen
  #changed = () => {
    const open = Boolean(this.capture?.stream)
    this.panel.label?.(this.#trying)
    clearInterval(this.#timer)
    this.#timer = open ? setInterval(() => this.#paint(), EVERY) : 0
    if (open) this.panel.list?.()
    else this.canvas.getContext('2d').clearRect(0, 0, this.canvas.width, this.canvas.height)
    this.refresh()
  }

  /** Say what there is to say. */
  refresh() {
    const open = this.#timer !== 0
    const shown = !this.qr.hidden
    this.hint.textContent = open || shown ? '' : this.told || this.tools.say(this.panel.hint)
    if (!this.#session || open) this.note.textContent = this.#remark()
  }

  // nothing is demanded of a camera, so one that cannot gives less, and it is said here
  #remark() {
    if (this.source !== 'browser' || !this.#timer) return ''
    if (this.#silent) return this.tools.say('visitSilent')
    const [given, wanted] = [Math.round(this.capture.rate), this.wish.fps]
    return given && given < wanted ? this.tools.say('cameraSlower', { given, wanted }) : ''
  }

  // -- a run ------------------------------------------------------------------------------

  /** It feeds a session now. @param place what the server says of this camera */
  attach(session, place) {
    const same = this.#session === session && this.#place?.source === place.source
    this.#session = session
    const before = JSON.stringify([this.#place?.phone, this.#place?.whip])
    this.#place = place
    if (same && before === JSON.stringify([place.phone, place.whip])) return
    this.allow.set(null)
    if (place.source === this.source) this.panel.attach?.(place)
  }

  detach() {
    if (!this.#session) return
    this.#session = this.#place = null
    this.#silent = false
    for (const panel of Object.values(this.panels)) panel.detach?.()
    this.told = UNUSED
    this.note.textContent = ''
    this.refresh()
  }

  /** How its source is, by the server's figures; of what this browser sends, whether it is silent. */
  stats({ sources, silent }) {
    if (!this.#session) return
    const source = sources?.[this.#place.node]
    this.#silent = silent?.includes(this.#place.node) ?? false
    if (source) this.panel.stats?.(source, (told) => this.#tell(told))
    this.refresh()
  }

  #tell({ state, fps, reason }) {
    const { say } = this.tools
    const keys = {
      giving: 'sourceGiving', connecting: 'sourceConnecting', connected: 'sourceConnecting',
      waiting: 'sourceWaiting', refused: 'sourceRefused'
    }
    // a phone's code stays, or why there is none
    const asking = state === 'asking'
    this.note.textContent = asking ? '' : say(keys[state] ?? 'sourceWaiting', { fps: fps.toFixed(1) })
    if (!asking) this.told = state === 'giving' ? say('sourceShown') : (reason ?? UNUSED)
  }

  /** Show a phone's code, or why there is none; null takes it away. */
  code(phone) {
    const { say } = this.tools
    const image = phone && !phone.trouble ? phone.qr : null
    this.qr.hidden = !image
    if (image && this.qr.src !== image) this.qr.src = image
    if (!image) this.qr.removeAttribute('src')
    const reasons = { local: 'phoneLocal', insecure: 'phoneInsecure' }
    const { url } = phone ?? {}
    if (phone?.trouble) this.told = say(reasons[phone.trouble], { url })
    else if (phone && !image) this.told = say('phoneNoCode', { url })
    this.refresh()
  }

  /** Another one-time address for a phone. */
  renew() {
    return this.#session.renewPhone(this.#place.node)
  }

  // the code as large as the page, for a phone that is further away
  #enlarge() {
    const { element, say } = this.tools
    const image = element('img', { src: this.qr.src, alt: say('phoneCode') })
    const words = element('p', { textContent: say('phoneScan') })
    const dialog = element('dialog', { className: 'livediffusion-large' }, image, words)
    dialog.onclick = () => dialog.close()
    dialog.onclose = () => dialog.remove()
    document.body.append(dialog)
    dialog.showModal()
  }

  async copy(text) {
    const { notify, say } = this.tools
    try {
      await navigator.clipboard.writeText(text)
      notify('success', say('copied'), text)
    } catch {
      // without https or localhost there is no clipboard: show it to be copied by hand
      notify('info', say('copyThis'), text)
    }
  }

  /** The server does not open it before somebody there has said so. @param errors of the node */
  refused(errors) {
    this.allow.refused(errors)
  }

  #allowing() {
    this.told = this.allow.words || UNUSED
    if (this.panels) this.refresh()
  }

  #given(address) {
    if (this.source === 'address') this.set('address', address)
  }

  #paint() {
    const { video } = this.capture ?? {}
    if (!video?.videoWidth || document.hidden) return
    const height = Math.round((320 * video.videoHeight) / video.videoWidth)
    if (this.canvas.height !== height) this.canvas.height = height
    this.canvas.classList.toggle('livediffusion-mirror', this.widgets.mirror?.value !== false)
    this.canvas.getContext('2d').drawImage(video, 0, 0, this.canvas.width, height)
  }

  remove() {
    this.#there = false
    clearInterval(this.#timer)
    this.#timer = 0
    this.detach()
    for (const capture of Object.values(this.captures)) {
      for (const event of ['opened', 'closed']) capture.removeEventListener(event, this.#changed)
      capture.leave(this)
    }
    for (const panel of Object.values(this.panels)) panel.remove?.()
  }
}
