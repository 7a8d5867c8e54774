// A text made of chunks that can be opened. It is one stop of the Tab key; arrow keys go from chunk to chunk.

import { make } from "/page/dom.js";

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

export class ChunkedText {
  // source: What the text continues, as an argument of requests: {prompt} or {messages}.
  // sampling: {sampler, temperature}, and the number of thoughts if the model takes any.
  // open: Called with this text and the number of the chunk that was opened.
  constructor(source, sampling, endTokens, open) {
    this.source = source;
    this.sampling = sampling;
    this.chunks = [];
    this.content = "";
    this.element = make("div", { className: "text", role: "group", "aria-label": "Text in chunks" });
    this.endTokens = endTokens;
    this.open = open;
    this.buttons = [];
    this.element.addEventListener("click", (event) => {
      const number = this.buttons.indexOf(event.target.closest("[role=button]"));
      if (number >= 0) this.visit(number, open);
    });
    this.element.addEventListener("keydown", (event) => this.#onKey(event));
  }

  add(chunk, text) {
    this.chunks.push(chunk);
    this.content += text;
    // Spaces around the words are not underlined.
    const [, front, words, back] = text.match(/^(\s*)(.*?)(\s*)$/s);
    // A real button would not break across lines, as text does.
    const button = make("span", {
      role: "button", tabIndex: this.buttons.length ? -1 : 0, textContent: words, className: "chunk",
      "aria-expanded": "false", "aria-controls": "chunk",
    });
    button.classList.toggle("spent", chunk.fell_back);
    button.classList.toggle("ends", this.hasEnd(chunk));
    button.classList.toggle("silent", words === "" && !this.hasEnd(chunk));
    this.buttons.push(button);
    const isBeginning = this.buttons.length === 1 && "messages" in this.source;
    this.element.append(isBeginning ? "" : front, button, back);
  }

  hasEnd(chunk) {
    return chunk.token_ids.some((token) => this.endTokens.includes(token));
  }

  // Shows which chunk is open, if any.
  mark(number = null) {
    this.buttons.forEach((button, index) => button.setAttribute("aria-expanded", String(index === number)));
    if (number !== null) this.#setTabStop(number);
  }

  visit(number, onVisit = null) {
    this.#setTabStop(number);
    this.buttons[number].focus();
    onVisit?.(this, number);
  }

  #setTabStop(number) {
    this.buttons.forEach((button, index) => { button.tabIndex = index === number ? 0 : -1; });
  }

  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const number = this.buttons.indexOf(document.activeElement);
    if (number < 0) return;
    if (event.key === "Enter" || event.key === " ") this.open(this, number);
    else if (event.key in STEPS) {
      this.visit(Math.min(Math.max(number + STEPS[event.key], 0), this.buttons.length - 1));
    } else return;
    event.preventDefault();
  }
}
