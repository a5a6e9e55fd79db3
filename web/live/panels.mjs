// What belongs to each source of a Live Camera: buttons and choices, beside the picture and words.
//
// A panel has parts (elements for the line above the picture) and hint (a key of words.mjs, for when
// nothing runs), and may have capture (see camera.mjs), begin() and remove() as its node comes to the
// graph and leaves it, show() when it is chosen, attach(place) with
// what the server says of the camera in a run, detach(), and stats(source, told).

const MOST = 1000 // ms between two questions after names, at least

/** A camera of this computer. */
class Browser {
  hint = 'cameraOff'

  constructor(picker) {
    const { say, element } = picker.tools
    this.picker = picker
    this.capture = picker.captures.browser
    this.select = element('select', { title: say('cameraTip'), onchange: () => this.#choose() })
    this.button = element('button', { title: say('tryTip'), onclick: () => picker.toggle() })
    this.parts = [this.select, this.button]
  }

  begin() {
    navigator.mediaDevices?.addEventListener?.('devicechange', this.list)
    this.list()
  }

  list = async () => {
    const { say, element } = this.picker.tools
    const devices = (await this.capture.devices()).filter((device) => device.id)
    const options = [{ id: '', label: say('defaultCamera') }, ...devices]
    this.select.replaceChildren(
      ...options.map(({ id, label }) => element('option', { value: id, textContent: label }))
    )
    this.select.value = this.capture.choice
    if (this.select.selectedIndex < 0) this.select.value = ''
  }

  async #choose() {
    try {
      await this.capture.choose(this.select.value)
    } catch (error) {
      this.picker.tools.notify('error', this.picker.tools.say('camera'), error.message)
      this.select.value = this.capture.choice
    }
  }

  label(trying) {
    this.button.textContent = this.picker.tools.say(trying ? 'off' : 'try')
  }

  remove() {
    navigator.mediaDevices?.removeEventListener?.('devicechange', this.list)
  }
}

/** The screen of this computer. */
class Screen {
  hint = 'screenOff'

  constructor(picker) {
    const { say, element } = picker.tools
    this.picker = picker
    this.capture = picker.captures.screen
    this.button = element('button', {
      textContent: say('screenChoose'),
      title: say('screenChooseTip'),
      onclick: () => this.#choose()
    })
    this.offButton = element('button', { textContent: say('off'), onclick: () => picker.toggle() })
    this.parts = [this.button, this.offButton]
  }

  begin() {
    this.capture.addEventListener('lost', this.#lost)
    this.capture.addEventListener('closed', this.#closed)
  }

  async #choose() {
    const { capture, picker } = this
    try {
      this.hint = 'screenOff'
      if (capture.users.size) await capture.choose()
      else await picker.toggle()
    } catch (error) {
      picker.tools.notify('error', picker.tools.say('screen'), error.message)
    }
  }

  // who uses it still waits for it
  #lost = () => {
    this.hint = 'screenEnded'
    this.picker.show()
  }

  #closed = () => {
    this.hint = 'screenOff'
  }

  label(trying) {
    this.offButton.hidden = !trying
  }

  remove() {
    this.capture.removeEventListener('lost', this.#lost)
    this.capture.removeEventListener('closed', this.#closed)
  }
}

/** A file in ComfyUI's input folder. */
class File {
  hint = 'playsLive'

  constructor(picker) {
    const { say, element } = picker.tools
    this.picker = picker
    const title = say('uploadTip')
    const onclick = () => this.#upload()
    this.parts = [element('button', { textContent: say('uploadFile'), title, onclick })]
  }

  #upload() {
    const { say, element, notify, upload } = this.picker.tools
    const input = element('input', { type: 'file', accept: 'video/*,image/*' })
    input.onchange = async () => {
      try {
        const name = await upload(input.files[0])
        const { file } = this.picker.widgets
        if (!file.options.values.includes(name)) file.options.values.push(name)
        this.picker.set('file', name)
      } catch (error) {
        notify('error', say('upload'), error.message)
      }
    }
    input.click()
  }
}

/** Something at the server that has a name: its cameras, or programs that send pictures. */
class Named {
  hint = 'playsLive'
  #asked = -Infinity

  constructor(picker, kind, input) {
    const { say, element } = picker.tools
    this.picker = picker
    this.kind = kind
    this.input = input
    this.select = element('select', {
      title: say('namesTip'),
      onchange: () => picker.set(input, this.select.value),
      onpointerdown: () => this.#ask(),
      onfocus: () => this.#ask()
    })
    this.parts = [this.select]
  }

  show() {
    this.#fill([])
    this.#ask()
  }

  async #ask() {
    if (performance.now() - this.#asked < MOST) return
    this.#asked = performance.now()
    const reply = await this.picker.tools.ask(`sources?kind=${this.kind}`).catch(() => null)
    if (!reply || this.picker.panel !== this) return
    this.#fill(reply.names)
    this.picker.told = reply.names.length ? '' : (reply.reason ?? '')
    this.picker.refresh()
  }

  #fill(names) {
    const { say, element } = this.picker.tools
    const value = this.picker.widgets[this.input]?.value ?? ''
    const known = value && !names.includes(value) ? [value, ...names] : names
    const first = say(this.input === 'sender' ? 'senderFirst' : 'deviceChoose')
    const options = [['', first], ...known.map((name) => [name, name])]
    this.select.replaceChildren(
      ...options.map(([value, textContent]) => element('option', { value, textContent }))
    )
    this.select.value = value
  }

  stats = (source, told) => told(source)
}

/** A stream. */
class Address {
  hint = 'playsLive'
  parts = []

  stats = (source, told) => told(source)
}

/** A phone, by a code that its camera reads. */
class Phone {
  hint = 'phoneOff'
  #place = null

  constructor(picker) {
    const { say, element } = picker.tools
    this.picker = picker
    this.copyButton = element('button', {
      textContent: say('phoneCopy'),
      title: say('phoneCopyTip'),
      onclick: () => picker.copy(this.#place.url)
    })
    this.newButton = element('button', {
      textContent: say('phoneNew'),
      title: say('phoneNewTip'),
      onclick: () => this.#renew()
    })
    this.words = element('span', { className: 'livediffusion-figures' })
    this.parts = [this.words, this.copyButton, this.newButton]
    this.#enable(false)
  }

  #enable(on) {
    this.words.textContent = ''
    this.copyButton.disabled = this.newButton.disabled = !on
  }

  attach({ phone }) {
    this.#place = phone
    this.#enable(Boolean(phone))
    this.picker.code(phone)
  }

  detach() {
    this.#place = null
    this.#enable(false)
    this.picker.code(null)
  }

  async #renew() {
    const { say, notify } = this.picker.tools
    try {
      this.attach({ phone: await this.picker.renew() })
    } catch (error) {
      notify('error', say('phone'), error.message)
    }
  }

  stats(source, told) {
    if (!this.#place) return
    const waiting = source.state === 'waiting'
    this.picker.code(waiting ? this.#place : null)
    this.words.textContent =
      waiting && this.#place.qr ? this.picker.tools.say('phoneAsking') : ''
    told(waiting ? { ...source, state: 'asking' } : source)
  }
}

/** A program that publishes by WHIP, such as OBS. */
class Whip {
  hint = 'whipOff'
  #place = null

  constructor(picker) {
    const { say, element } = picker.tools
    const button = (textContent, title, onclick) =>
      element('button', { textContent, title, disabled: true, onclick })
    this.picker = picker
    const { url: here } = picker.tools
    const copy = () => picker.copy(here(this.#place.url))
    this.copyButton = button(say('whipCopy'), say('whipCopyTip'), copy)
    const token = () => picker.copy(this.#place.token)
    this.tokenButton = button(say('whipToken'), say('whipTokenTip'), token)
    this.parts = [this.copyButton, this.tokenButton]
  }

  attach({ whip }) {
    this.#place = whip
    this.copyButton.disabled = !whip
    this.tokenButton.hidden = !whip?.token
    this.tokenButton.disabled = !whip?.token
  }

  detach() {
    this.attach({})
  }

  stats = (source, told) => told(source)
}

/** A panel for each source. */
export const panels = (picker) => ({
  browser: new Browser(picker),
  file: new File(picker),
  screen: new Screen(picker),
  device: new Named(picker, 'device', 'device'),
  address: new Address(),
  ndi: new Named(picker, 'ndi', 'sender'),
  spout: new Named(picker, 'spout', 'sender'),
  syphon: new Named(picker, 'syphon', 'sender'),
  phone: new Phone(picker),
  whip: new Whip(picker)
})
