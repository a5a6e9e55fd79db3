// The Live Camera's choice of a camera and a small picture of what it sees.

const SIZE = 130
const MARGINS = 20 // px that the canvas leaves around a widget, of its height
const EVERY = 100 // ms between two pictures of the preview

export class Picker {
  #timer = 0

  /**
   * @param node a LiveCamera
   * @param camera see camera.mjs
   * @param tools element(), notify(severity, summary, detail), upload(file)
   */
  constructor(node, camera, tools) {
    const { element } = tools
    this.node = node
    this.camera = camera
    this.tools = tools
    this.select = element('select', {
      title: 'The camera of this computer. Not part of the workflow.',
      onchange: () => this.#choose()
    })
    this.button = element('button', {
      textContent: 'Try',
      title: 'Open the camera to see its picture; again to close it.',
      onclick: () => this.toggle()
    })
    this.canvas = element('canvas', { width: 320, height: 180 })
    this.hint = element('div', { className: 'livediffusion-hint' })
    this.upload = element('button', {
      textContent: 'Upload a video or animated picture',
      title: "Into ComfyUI's input folder.",
      onclick: () => this.#upload()
    })
    const line = element(
      'div',
      { className: 'livediffusion-line' },
      this.select,
      this.button,
      this.upload
    )
    const screen = element('div', { className: 'livediffusion-screen' }, this.canvas, this.hint)
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
    this.widget.label = 'camera'
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
    if (!this.#timer) this.hint.textContent = browser ? 'The camera is off' : 'Plays while live'
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
      this.tools.notify('error', 'Camera', error.message)
    }
    this.#label()
  }

  async #upload() {
    const { element, notify } = this.tools
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
        notify('error', 'Upload', error.message)
      }
    }
    input.click()
  }

  async #choose() {
    try {
      await this.camera.choose(this.select.value)
    } catch (error) {
      this.tools.notify('error', 'Camera', error.message)
      this.select.value = this.camera.choice
    }
  }

  #list = async () => {
    const { element } = this.tools
    const devices = (await this.camera.devices()).filter((device) => device.id)
    const options = [{ id: '', label: 'Default camera' }, ...devices]
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
    clearInterval(this.#timer)
    this.#timer = setInterval(() => this.#paint(), EVERY)
  }

  #closed = () => {
    clearInterval(this.#timer)
    this.#timer = 0
    this.#label()
    this.canvas.getContext('2d').clearRect(0, 0, this.canvas.width, this.canvas.height)
    this.show()
  }

  #label() {
    this.button.textContent = this.#trying ? 'Off' : 'Try'
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
