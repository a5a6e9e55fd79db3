// Looks, in ComfyUI's own colours; every rule is below a class or attribute of ours.

/** Black lines, as a mask. */
const icon = (shapes) =>
  `url("data:image/svg+xml,${encodeURIComponent(
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 12' fill='none' stroke='black' " +
      `stroke-width='1.5'>${shapes}</svg>`
  )}")`

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
.livediffusion-stage {
  position: absolute; inset: 0; margin: auto;
  width: min(100cqw, 100cqh * var(--aspect)); height: min(100cqh, 100cqw / var(--aspect));
}
.livediffusion-compare { container-type: size; }
.livediffusion-input, .livediffusion-output { position: absolute; inset: 0; overflow: hidden; }
.livediffusion-input, .livediffusion-divider, .livediffusion-label { display: none; }
.livediffusion-label {
  position: absolute; bottom: 8px; padding: 2px 8px; border-radius: 9px; color: #fff;
  background: rgb(0 0 0 / 45%); font: 11px/1.4 Inter, system-ui, sans-serif;
  pointer-events: none; user-select: none;
}
.livediffusion-input .livediffusion-label { left: 8px; }
.livediffusion-output .livediffusion-label { right: 8px; }
[data-compare='side by side'] .livediffusion-stage {
  width: min(100cqw, 200cqh * var(--aspect)); height: min(100cqh, 50cqw / var(--aspect));
}
[data-compare='side by side'] .livediffusion-label,
[data-compare='side by side'] .livediffusion-input,
[data-compare='line'] .livediffusion-label, [data-compare='line'] .livediffusion-input,
[data-compare='line'] .livediffusion-divider { display: block; }
[data-compare='side by side'] .livediffusion-input { right: calc(50% + 1px); }
[data-compare='side by side'] .livediffusion-output { left: calc(50% + 1px); }
[data-compare='line'] .livediffusion-stage { cursor: ew-resize; touch-action: none; }
[data-compare='line'] .livediffusion-input { clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.livediffusion-divider {
  position: absolute; top: 0; bottom: 0; left: var(--at); width: 44px; margin-left: -22px;
  outline: none;
}
.livediffusion-divider::before {
  content: ''; position: absolute; top: 0; bottom: 0; left: 21px; width: 2px; background: #fff;
  box-shadow: 0 0 3px rgb(0 0 0 / 50%);
}
.livediffusion-divider::after {
  content: ''; position: absolute; top: 50%; left: 6px; width: 32px; height: 32px;
  margin-top: -16px; border-radius: 50%; box-shadow: 0 1px 5px rgb(0 0 0 / 45%);
  background: #fff url("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32' fill='none' stroke='%23333' stroke-width='2' stroke-linecap='round' stroke-linejoin='round'%3E%3Cpath d='M12 11l-5 5 5 5M20 11l5 5-5 5'/%3E%3C/svg%3E");
}
.livediffusion-divider:focus-visible::after { outline: 3px solid #4c9ffe; outline-offset: 1px; }
.livediffusion-window { position: fixed; inset: 0; border-radius: 0; }
.livediffusion-note, .livediffusion-rate {
  position: absolute; left: 50%; bottom: 8px; transform: translateX(-50%); padding: 2px 10px;
  border-radius: 9px; background: rgb(0 0 0 / 55%); color: #ddd; white-space: nowrap;
  pointer-events: none;
}
.livediffusion-note:empty, .livediffusion-rate:empty { display: none; }
.livediffusion-tools { display: flex; flex: 1 0 auto; justify-content: flex-end; gap: 4px; }
.livediffusion-switch { display: flex; flex: none; margin-right: auto; }
.livediffusion-box .livediffusion-choice {
  display: flex; align-items: center; justify-content: center; width: 28px; padding: 0;
  border-radius: 0;
}
.livediffusion-box .livediffusion-choice + .livediffusion-choice { border-left: 0; }
.livediffusion-box .livediffusion-choice:first-child { border-radius: 5px 0 0 5px; }
.livediffusion-box .livediffusion-choice:last-child { border-radius: 0 5px 5px 0; }
.livediffusion-choice::before {
  content: ''; width: 16px; height: 12px; background: currentColor; opacity: 0.55;
  -webkit-mask: var(--icon) center / contain no-repeat;
  mask: var(--icon) center / contain no-repeat;
}
.livediffusion-choice:hover::before { opacity: 0.85; }
.livediffusion-box .livediffusion-choice[aria-pressed='true'] {
  background: var(--border-color, #4e4e4e);
}
.livediffusion-choice[aria-pressed='true']::before { opacity: 1; }
.livediffusion-choice[data-mode='off'] { --icon: ${icon("<rect x='.75' y='.75' width='14.5' height='10.5' rx='1.5'/>")}; }
.livediffusion-choice[data-mode='side by side'] {
  --icon: ${icon("<rect x='.75' y='1.75' width='6' height='8.5' rx='1' fill='black'/><rect x='9.25' y='1.75' width='6' height='8.5' rx='1'/>")};
}
.livediffusion-choice[data-mode='line'] {
  --icon: ${icon("<rect x='.75' y='.75' width='14.5' height='10.5' rx='1.5'/><path d='M1 1h7v10H1z' fill='black'/>")};
}
.livediffusion-screen canvas.livediffusion-mirror { transform: scaleX(-1); }
.livediffusion-hint {
  position: absolute; inset: 0; display: flex; align-items: center; justify-content: center;
  padding: 8px; text-align: center; color: #bbb; pointer-events: none;
}
.livediffusion-hint:empty { display: none; }
.livediffusion-qr {
  position: absolute; inset: 6px; margin: auto; height: calc(100% - 12px); aspect-ratio: 1;
  border-radius: 6px; cursor: zoom-in; image-rendering: pixelated;
}
.livediffusion-large {
  border: 0; border-radius: 16px; padding: 24px; background: #fff; color: #222; text-align: center;
  font: 16px/1.4 Inter, system-ui, sans-serif; cursor: zoom-out;
}
.livediffusion-large::backdrop { background: rgb(0 0 0 / 60%); }
.livediffusion-large img { display: block; width: min(70vmin, 640px); image-rendering: pixelated; }
.livediffusion-large p { margin: 12px 0 0; }
.livediffusion-reason {
  overflow: hidden; color: #e8a33d; display: -webkit-box; -webkit-line-clamp: 3;
  -webkit-box-orient: vertical;
}
.livediffusion-figures[data-state='sending']::before { content: '\\25CF '; color: #3fb968; }
.livediffusion-figures[data-state='waiting']::before,
.livediffusion-figures[data-state='refused']::before { content: '\\25CF '; color: #e8a33d; }
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
[data-livediffusion-error] {
  outline: 3px solid #b3261e; outline-offset: 3px; border-radius: 16px;
}
.livediffusion-run {
  width: 100%; height: 40px; margin-bottom: 12px; border: 0; border-radius: 8px; cursor: pointer;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd);
  font: 500 14px/1 Inter, system-ui, sans-serif;
}
.livediffusion-app {
  position: absolute; inset: 56px 16px 16px; z-index: 15; display: flex; flex-direction: column;
  gap: 12px;
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

const dressed = new WeakSet()

/** Once for each document: the page, and windows of their own. */
export function addStyle(page) {
  if (dressed.has(page)) return
  dressed.add(page)
  // not as an element, which a page that lets in no inline styles would refuse
  const sheet = new page.defaultView.CSSStyleSheet()
  sheet.replaceSync(CSS)
  page.adoptedStyleSheets = [...page.adoptedStyleSheets, sheet]
}

/** An element with properties, class and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties)
  made.append(...children)
  return made
}
