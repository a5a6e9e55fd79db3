// The page's words: which language, and how times are said.

// see locales/
const LANGUAGES = ['en', 'es', 'fr', 'ja', 'ko', 'pt-BR', 'ru', 'zh', 'zh-TW']
const TRADITIONAL = /^zh\b.*\b(tw|hk|mo|hant)\b/i

// what the pack's modules say of ComfyUI's page, as this page has to say it
const HERE = {
  NotAllowedError: 'visitNotAllowed',
  NotFoundError: 'visitNotFound',
  NotReadableError: 'visitNotReadable',
  OverconstrainedError: 'visitCameraGone',
  insecure: 'visitInsecure',
  broke: 'visitBroke'
}

/** The first of a browser's languages that there are words in. */
export function chosen(wished) {
  for (const tag of wished) {
    if (TRADITIONAL.test(tag)) return 'zh-TW'
    const [plain] = tag.toLowerCase().split('-')
    const found = LANGUAGES.find((one) => one.toLowerCase().split('-')[0] === plain)
    if (found) return found
  }
  return 'en'
}

/** What a page says: as Words, in the words of this one. */
export const spoken = (words) => (key, values) => words.say(HERE[key] ?? key, values)

/** About so long, in words: "40 seconds", "3 minutes". */
export function about(seconds, language) {
  const [value, unit] =
    seconds < 55 ? [Math.max(5, 5 * Math.ceil(seconds / 5)), 'second'] : [Math.ceil(seconds / 60), 'minute']
  const form = { style: 'unit', unit, unitDisplay: 'long' }
  return new Intl.NumberFormat(language, form).format(value)
}

/** 1:05 */
export function clock(seconds) {
  const whole = Math.max(0, Math.ceil(seconds))
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, '0')}`
}
