// The inputs that a workflow exposes, as controls that a stranger can use.

const TYPED = 300 // ms after the last key
const DRAGGED = 60 // ms between two values of a slider that is moved
const AT_ONCE = 0
const LONGEST = 2000 // characters, where the house says no number
const FINEST = 10_000 // steps that a slider can have
const MANY = 1_000_000 // whole numbers of which one is as good as another

const KEYS = /^(insertText|delete)/ // an arrow of a number's box that is held is as a slider

let numbers = 0

export class Controls {
  #words
  #say
  #element
  #values
  #camera
  #fields = new Map() // name -> {field, show, refusal}
  #inputs = []
  #reset
  #cameraField = null
  #makers = {
    text: (input) => this.#text(input),
    number: (input) => this.#number(input),
    integer: (input) => this.#integer(input),
    boolean: (input) => this.#boolean(input),
    choice: (input) => this.#choice(input)
  }

  /**
   * @param form to be filled
   * @param tools words, say(key, values), element(), values (see values.mjs), camera
   */
  constructor(form, { words, say, element, values, camera }) {
    this.form = form
    this.#words = words
    this.#say = say
    this.#element = element
    this.#values = values
    this.#camera = camera
    form.onsubmit = (event) => event.preventDefault()
    values.addEventListener('refused', ({ detail }) => this.#refuse(detail.name, detail.reason))
    values.addEventListener('taken', ({ detail }) => this.#refuse(detail.name, ''))
    this.#reset = element('button', {
      type: 'button',
      className: 'quiet',
      textContent: say('visitReset'),
      onclick: () => this.#asItWas()
    })
  }

  /** Whether there is anything to be set. */
  get any() {
    return this.#fields.size > 0
  }

  /**
   * @param inputs what the house said
   * @param camera whether a camera of this computer is used, and may be chosen
   */
  show(inputs, camera) {
    const told = JSON.stringify([inputs, camera])
    if (told === this.told) return // what is being typed stays
    this.told = told
    this.#inputs = inputs.filter(({ type }) => type in this.#makers)
    this.#fields.clear()
    const wanted = this.#values.wanted
    const made = this.#inputs.map((input) => this.#field(input, wanted[input.name] ?? input.value))
    if (camera) {
      this.#cameraField ??= this.#cameras()
      made.unshift(this.#cameraField)
    }
    this.form.replaceChildren(...made, this.#reset)
    this.#mark()
  }

  #field(input, value) {
    const id = `field${numbers++}`
    const own = this.#words.input(input.node_type, input.input)
    const plain = (text) => String(text ?? '').toLowerCase().replace(/[_\s]+/g, ' ')
    // what its author has called it stays; ComfyUI's own name is said in the visitor's language
    const name = plain(input.label) === plain(input.input) ? own.name ?? input.label : input.label
    const told = own.tooltip ?? input.tooltip ?? ''
    const field = this.#element('div', { className: `field ${input.type}` })
    const label = this.#element('label', { htmlFor: id, textContent: capital(name), title: told })
    const refusal = this.#element('p', { className: 'refusal', id: `${id}r` })
    refusal.setAttribute('role', 'alert')
    const { parts, show, main } = this.#makers[input.type](input)
    main.id = id
    main.title = told
    main.setAttribute('aria-describedby', refusal.id)
    for (const part of parts) {
      const doing = part.tagName === 'BUTTON' ? [part.textContent] : []
      if (part !== main) part.setAttribute('aria-label', [capital(name), ...doing].join(': '))
    }
    field.append(label, this.#element('div', { className: 'parts' }, ...parts), refusal)
    show(value)
    this.#fields.set(input.name, { show, refusal, main })
    return field
  }

  #set({ name }, value, wait) {
    this.#refuse(name, '')
    this.#values.set(name, value, wait, wait === TYPED)
    this.#mark()
  }

  #text(input) {
    const kind = input.multiline ? 'textarea' : 'input'
    const main = this.#element(kind, { maxLength: input.max ?? LONGEST, spellcheck: false, autocomplete: 'off' })
    if (input.multiline) main.rows = 3
    main.oninput = () => this.#set(input, main.value, TYPED)
    return { parts: [main], main, show: (value) => (main.value = value) }
  }

  #boolean(input) {
    const main = this.#element('input', { type: 'checkbox' })
    main.setAttribute('role', 'switch')
    main.onchange = () => this.#set(input, main.checked, AT_ONCE)
    return { parts: [main], main, show: (value) => (main.checked = value) }
  }

  #choice(input) {
    const called = (option) => this.#words.option(input.node_type, input.input, option)
    const options = input.options.map((option, i) =>
      this.#element('option', { value: i, textContent: called(option) })
    )
    const main = this.#element('select', {}, ...options)
    main.onchange = () => this.#set(input, input.options[Number(main.value)], AT_ONCE)
    return { parts: [main], main, show: (value) => (main.value = input.options.indexOf(value)) }
  }

  #integer(input) {
    return this.#number({ ...input, step: Math.max(1, Math.round(input.step ?? 1)), whole: true })
  }

  #number(input) {
    // no page knows a larger whole number exactly
    const most = input.whole ? Number.MAX_SAFE_INTEGER : Number.MAX_VALUE
    const min = Math.max(input.min ?? -most, -most)
    const max = Math.min(input.max ?? most, most)
    const step = input.step || (input.whole ? 1 : 0.01)
    const box = this.#element('input', { type: 'number', min, max, step, inputMode: 'decimal' })
    if (input.whole) box.inputMode = min < 0 ? 'text' : 'numeric'
    const fit = (value) => {
      const near = input.whole ? Math.round(value) : value
      return Math.min(max, Math.max(min, near))
    }
    const typed = () => (box.value.trim() === '' ? NaN : Number(box.value))
    const parts = [box]
    let slider = null
    const show = (value) => {
      box.value = value
      if (slider) slider.value = value
      if (slider) fill(slider)
    }
    box.oninput = ({ inputType }) => {
      const value = typed()
      if (!Number.isFinite(value) || fit(value) !== value) return
      if (slider) fill(Object.assign(slider, { value }))
      this.#set(input, value, KEYS.test(inputType) ? TYPED : DRAGGED)
    }
    // what cannot be becomes what is next to it, once the hand is off the keys
    box.onchange = () => {
      const value = typed()
      const near = fit(Number.isFinite(value) ? value : input.value)
      if (near === value) return
      show(near)
      this.#set(input, near, AT_ONCE)
    }
    if ((max - min) / step <= FINEST) {
      slider = this.#element('input', { type: 'range', min, max, step })
      slider.oninput = () => {
        box.value = slider.value
        fill(slider)
        this.#set(input, Number(slider.value), DRAGGED)
      }
      parts.unshift(slider)
    } else if (input.whole && max - min >= MANY) {
      const dice = this.#element('button', { type: 'button', textContent: this.#say('visitAnother') })
      dice.onclick = () => {
        const value = fit(min + Math.floor(Math.random() * Math.min(max - min, 2 ** 32)))
        show(value)
        this.#set(input, value, AT_ONCE)
      }
      parts.push(dice)
    }
    return { parts, main: slider ?? box, show }
  }

  /** Cameras of this computer: chosen here, told to nobody. */
  #cameras() {
    const id = `field${numbers++}`
    const select = this.#element('select', { id })
    const refusal = this.#element('p', { className: 'refusal' })
    refusal.setAttribute('role', 'alert')
    const label = this.#element('label', { htmlFor: id, textContent: capital(this.#say('camera')) })
    const parts = this.#element('div', { className: 'parts' }, select)
    const field = this.#element('div', { className: 'field camera', hidden: true })
    field.append(label, parts, refusal)
    const list = async () => {
      const devices = (await this.#camera.devices()).filter((device) => device.id)
      field.hidden = devices.length < 2
      const all = [{ id: '', label: this.#say('defaultCamera') }, ...devices]
      select.replaceChildren(
        ...all.map((one) => this.#element('option', { value: one.id, textContent: one.label }))
      )
      select.value = this.#camera.choice
      if (select.selectedIndex < 0) select.value = ''
    }
    select.onchange = async () => {
      refusal.textContent = ''
      try {
        await this.#camera.choose(select.value)
      } catch (error) {
        refusal.textContent = error.message
        select.value = this.#camera.choice
      }
    }
    this.#camera.addEventListener('opened', list)
    navigator.mediaDevices?.addEventListener?.('devicechange', list)
    list()
    return field
  }

  #refuse(name, reason) {
    const { refusal, main } = this.#fields.get(name) ?? {}
    if (!refusal || refusal.textContent === reason) return
    refusal.textContent = reason
    if (reason) main.setAttribute('aria-invalid', 'true')
    else main.removeAttribute('aria-invalid')
  }

  #changed = ({ name, value }) => (this.#values.wanted[name] ?? value) !== value

  #mark() {
    this.#reset.hidden = !this.#inputs.some(this.#changed)
  }

  #asItWas() {
    for (const input of this.#inputs.filter(this.#changed)) {
      this.#fields.get(input.name).show(input.value)
      this.#set(input, input.value, AT_ONCE)
    }
  }
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1)

/** How far a slider is, for its looks. */
function fill(slider) {
  const { min, max, value } = slider
  slider.style.setProperty('--part', `${(100 * (value - min)) / (max - min || 1)}%`)
}
