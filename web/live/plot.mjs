// A schedule as a small picture: noise level against step, beside other schedules.

const SVG = 'http://www.w3.org/2000/svg'
const [WIDTH, HEIGHT] = [300, 130]
const [LEFT, RIGHT, TOP, BOTTOM] = [34, 8, 8, 16]
const COLOURS = ['#e0a030', '#4aa3df', '#9b6fd0', '#58b368']
const LINE = 15 // px of a line of text

/** A number as short as it may be: 14.6, 0.03. */
export const short = (value) => String(Number(value.toPrecision(value >= 1 ? 3 : 2)))

/** Places of levels in the picture; a level of 0 has no logarithm and lies on the ground. */
export function places(levels, low, high) {
  const wide = WIDTH - LEFT - RIGHT
  const tall = HEIGHT - TOP - BOTTOM
  return levels.map((level, k) => {
    const height = level > 0 ? (Math.log(level) - low) / (high - low) : 0
    return [LEFT + (wide * k) / (levels.length - 1), TOP + tall * (1 - Math.max(height, 0))]
  })
}

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  if (text !== undefined) made.textContent = text
  return made
}

export class Plot {
  /**
   * @param node a node that gives SIGMAS
   * @param tools say(key, values), element()
   */
  constructor(node, tools) {
    this.node = node
    this.say = tools.say
    this.element = tools.element
    this.box = this.element('div', { className: 'livediffusion-box livediffusion-plot' })
    this.lines = 0
    this.widget = node.addDOMWidget('livediffusion_steps', 'livediffusion.steps', this.box, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => this.height
    })
    this.widget.serialize = false
    this.widget.label = this.say('steps')
  }

  get height() {
    return HEIGHT + LINE * this.lines + 12
  }

  /** @param steps levels, others by name, lines of text */
  show({ levels, others, lines }) {
    const grown = this.lines === 0
    const above = [levels, ...Object.values(others)].flat().filter((level) => level > 0)
    // the ground lies a little below the lowest level
    const [least, high] = [Math.log(Math.min(...above)), Math.log(Math.max(...above)) + 0.01]
    const low = least - 0.15 * (high - least)
    const svg = shape('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img' })
    const named = { [this.say('noiseLevels')]: levels, ...others }
    svg.append(shape('title', {}, Object.keys(named).join(', ')))
    for (const level of [Math.max(...above), Math.min(...above), 0]) {
      const [[, y]] = places([level, 0], low, high)
      svg.append(
        shape('line', { x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y, class: 'livediffusion-rule' }),
        shape('text', { x: LEFT - 4, y: y + 3, 'text-anchor': 'end' }, short(level))
      )
    }
    Object.values(others).forEach((other, i) => {
      const points = places(other, low, high).join(' ')
      const stroke = COLOURS[i % COLOURS.length]
      svg.append(shape('polyline', { points, stroke, 'stroke-dasharray': '4 3', fill: 'none' }))
    })
    const own = places(levels, low, high)
    svg.append(shape('polyline', { points: own.join(' '), class: 'livediffusion-own' }))
    own.forEach(([x, y], k) => {
      const dot = shape('circle', { cx: x, cy: y, r: 3, class: 'livediffusion-dot' })
      const step = this.say('step', { step: k, level: short(levels[k]) })
      dot.append(shape('title', {}, step))
      svg.append(dot)
    })
    const legend = this.element('div', { className: 'livediffusion-legend' })
    Object.keys(others).forEach((name, i) => {
      const key = this.element('span', { textContent: name })
      key.style.color = COLOURS[i % COLOURS.length]
      legend.append(key)
    })
    const text = lines.map((line) =>
      this.element('div', { className: 'livediffusion-figures', textContent: line, title: line })
    )
    this.box.replaceChildren(svg, legend, ...text)
    this.lines = lines.length + 1
    this.box.style.minHeight = `${this.height - 12}px`
    if (grown) this.#grow()
  }

  #grow() {
    const [width, height] = this.node.size
    const [wide, tall] = this.node.computeSize?.() ?? [width, height + this.height]
    this.node.setSize?.([Math.max(width, wide), Math.max(height, tall)])
    this.node.setDirtyCanvas?.(true, true)
  }
}
