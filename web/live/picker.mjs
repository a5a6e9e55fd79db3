// The Live Camera's choice of a camera and a small picture of what it sees.

const SIZE = 130
const MARGINS = 20 // px that the canvas leaves around a widget, of its height
const EVERY = 100 // ms between two pictures of the preview

export class Picker {
  #timer = 0

  /**
   * @param node a LiveCamera
   * @param camera see camera.mjs
   * @param tools say(key, values), element(), notify(severity, summary, detail), upload(file)
   */
  constructor(node, camera, tools) {
    const { say, element } = tools
    this.node = node
    this.camera = camera
    this.tools = tools
    this.select = element('select', {
      title: say('cameraTip'),
      onchange: () => this.#choose()
    })
    this.button = element('button', {
      textContent: say('try'),
      title: say('tryTip'),
      onclick: () => this.toggle()
    })
    this.canvas = element('canvas', { width: 320, height: 180 })
    this.hint = element('div', { className: 'livediffusion-hint' })
    this.note = element('div', { className: 'livediffusion-rate' })
    this.upload = element('button', {
      textContent: say('uploadFile'),
      title: say('uploadTip'),
      onclick: () => this.#upload()
    })
    const line = element(
      'div',
      { className: 'livediffusion-line' },
      this.select,
      this.button,
      this.upload
    )
    const screen = element(
      'div',
      { className: 'livediffusion-screen' },
      this.canvas,
      this.note,
      this.hint
    )
    const box = element('div', { className: 'livediffusion-box' }, line, screen)
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
    camera.addEventListener('opened', this.#opened)
    camera.addEventListener('closed', this.#closed)
    navigator.mediaDevices?.addEventListener?.('devicechange', this.#list)
    const { source } = this.#widgets
    const changed = source.callback
    source.callback = (...values) => {
      changed?.apply(source, values)
      this.show()
    }
    this.#list()
    this.#closed()
    if (camera.stream) this.#opened()
  }

  /** What belongs to the chosen source. */
  show() {
    const browser = this.usesBrowser
    this.select.hidden = this.button.hidden = !browser
    this.upload.hidden = browser
    if (!browser && this.#trying) this.toggle()
    if (!this.#timer) this.hint.textContent = this.tools.say(browser ? 'cameraOff' : 'playsLive')
  }

  get #widgets() {
    return Object.fromEntries((this.node.widgets ?? []).map((w) => [w.name, w]))
  }

  get usesBrowser() {
    return this.#widgets.source?.value !== 'file'
  }

  /** {width, height, fps} that the node says; an input that is wired says none. */
  get wish() {
    const { width, height, fps } = this.#widgets
    return { width: width?.value, height: height?.value, fps: fps?.value }
  }

  get #trying() {
    return this.camera.users.has(this)
  }

  async toggle() {
    try {
      if (this.#trying) this.camera.leave(this)
      else await this.camera.use(this, [this.wish])
    } catch (error) {
      this.tools.notify('error', this.tools.say('camera'), error.message)
    }
    this.#label()
  }

  async #upload() {
    const { say, element, notify } = this.tools
    const input = element('input', { type: 'file', accept: 'video/*,image/*' })
    input.onchange = async () => {
      try {
        const name = await this.tools.upload(input.files[0])
        const { file } = this.#widgets
        if (!file.options.values.includes(name)) file.options.values.push(name)
        file.value = name
        file.callback?.(name)
        document.dispatchEvent(new Event('change'))
      } catch (error) {
        notify('error', say('upload'), error.message)
      }
    }
    input.click()
  }

  async #choose() {
    try {
      await this.camera.choose(this.select.value)
    } catch (error) {
      this.tools.notify('error', this.tools.say('camera'), error.message)
      this.select.value = this.camera.choice
    }
  }

  #list = async () => {
    const { say, element } = this.tools
    const devices = (await this.camera.devices()).filter((device) => device.id)
    const options = [{ id: '', label: say('defaultCamera') }, ...devices]
    this.select.replaceChildren(
      ...options.map(({ id, label }) => element('option', { value: id, textContent: label }))
    )
    this.select.value = this.camera.choice
    if (this.select.selectedIndex < 0) this.select.value = ''
  }

  #opened = () => {
    this.#list()
    this.#label()
    this.hint.textContent = ''
    this.#remark()
    clearInterval(this.#timer)
    this.#timer = setInterval(() => this.#paint(), EVERY)
  }

  #closed = () => {
    clearInterval(this.#timer)
    this.#timer = 0
    this.#label()
    this.note.textContent = ''
    this.canvas.getContext('2d').clearRect(0, 0, this.canvas.width, this.canvas.height)
    this.show()
  }

  #label() {
    this.button.textContent = this.tools.say(this.#trying ? 'off' : 'try')
  }

  // nothing is demanded of a camera, so one that cannot gives less, and it is said here
  #remark() {
    const [given, wanted] = [Math.round(this.camera.rate), this.wish.fps]
    const slower = this.usesBrowser && given && given < wanted
    this.note.textContent = slower ? this.tools.say('cameraSlower', { given, wanted }) : ''
  }

  #paint() {
    const { video } = this.camera
    if (!video?.videoWidth || document.hidden) return
    const height = Math.round((320 * video.videoHeight) / video.videoWidth)
    if (this.canvas.height !== height) this.canvas.height = height
    this.canvas.classList.toggle('livediffusion-mirror', this.#widgets.mirror?.value !== false)
    this.canvas.getContext('2d').drawImage(video, 0, 0, this.canvas.width, height)
  }

  remove() {
    clearInterval(this.#timer)
    this.camera.removeEventListener('opened', this.#opened)
    this.camera.removeEventListener('closed', this.#closed)
    navigator.mediaDevices?.removeEventListener?.('devicechange', this.#list)
    this.camera.leave(this)
  }
}
