// Looks, in ComfyUI's own colours; every rule is below a class of ours.

const CSS = `
.livediffusion-box {
  display: flex; flex-direction: column; gap: 4px; box-sizing: border-box;
  width: 100%; height: 100%; min-height: 0; padding: 2px 0;
  color: var(--input-text, #ddd); font: 11px/1.3 Inter, system-ui, sans-serif;
}
.livediffusion-screen {
  position: relative; flex: 1 1 0; min-height: 0; overflow: hidden; border-radius: 6px;
  background: #000;
}
.livediffusion-screen canvas {
  position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; display: block;
}
.livediffusion-screen canvas.livediffusion-mirror { transform: scaleX(-1); }
.livediffusion-hint {
  position: absolute; inset: 0; display: flex; align-items: center; justify-content: center;
  padding: 8px; text-align: center; color: #bbb; pointer-events: none;
}
.livediffusion-hint:empty { display: none; }
.livediffusion-line {
  display: flex; flex-wrap: wrap; align-items: center; justify-content: flex-end; gap: 4px;
  flex: none; min-width: 0;
}
.livediffusion-figures {
  flex: 1 1 auto; min-width: 0; overflow: hidden; white-space: nowrap; text-overflow: ellipsis;
  font-variant-numeric: tabular-nums;
}
.livediffusion-box button, .livediffusion-box select {
  height: 22px; padding: 0 6px; border: 1px solid var(--border-color, #4e4e4e);
  border-radius: 5px; background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd);
  font: inherit; cursor: pointer;
}
.livediffusion-box button { flex: none; }
.livediffusion-box [hidden] { display: none; }
.livediffusion-box select { flex: 1 1 0; min-width: 0; text-overflow: ellipsis; }
.livediffusion-box button:hover:not(:disabled), .livediffusion-box select:hover {
  filter: brightness(1.2);
}
.livediffusion-box button:disabled { opacity: 0.5; cursor: default; }
.livediffusion-live[data-state='live'], .livediffusion-live[data-state='stopping'] {
  background: #b3261e !important; color: #fff !important;
}
.livediffusion-live[data-state='starting'], .livediffusion-live[data-state='queued'] {
  background: var(--comfy-input-bg, #333) !important;
}
.livediffusion-plot { gap: 2px; }
.livediffusion-plot svg { flex: 1 1 0; min-height: 0; width: 100%; display: block; }
.livediffusion-plot svg text { font-size: 10px; fill: var(--input-text, #ddd); opacity: 0.7; }
.livediffusion-rule { stroke: var(--border-color, #4e4e4e); }
.livediffusion-own { fill: none; stroke: var(--input-text, #ddd); stroke-width: 2; }
.livediffusion-dot { fill: var(--input-text, #ddd); }
.livediffusion-legend { display: flex; flex-wrap: wrap; gap: 0 10px; flex: none; }
.livediffusion-plot .livediffusion-figures { flex: none; }
`

let added = false

export function addStyle() {
  if (added) return
  added = true
  const style = document.createElement('style')
  style.textContent = CSS
  document.head.append(style)
}

/** An element with properties, class and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties)
  made.append(...children)
  return made
}
