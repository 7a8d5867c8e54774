// Continues a prompt.

import { ChunkedText } from "/page/chunks.js";
import { announce, byId, copy, make, showMessage } from "/page/dom.js";
import { chunkPhrase, summarize } from "/page/words.js";
import { Writer } from "/page/writing.js";

export class Continue {
  constructor(about, settings, inspector) {
    Object.assign(this, { about, settings, inspector, section: byId("continue") });
    this.writer = new Writer(this.#part("form"));
    this.#part(".guide p").textContent = `The model continues your prompt ${chunkPhrase(about)}. Open any `
      + "chunk to see what else could have come in its place, and how temperature changes the odds.";
    this.#part("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.#part(".copy").addEventListener("click", (event) => copy(byId("text").textContent, event.target));
  }

  async submit() {
    if (this.writer.isBusy || !this.settings.check()) return;
    const prompt = byId("prompt").value;
    const text = new ChunkedText({ prompt }, this.settings.sampling, this.about.eos_token_ids,
      (...opened) => this.inspector.open(...opened));
    this.inspector.forget();
    this.#begin(make("span", { className: "prompt", textContent: prompt }), text.element);
    const body = { model: this.about.model, ...this.settings.arguments };
    this.#end(text, await this.writer.fill(text, "/v1/completions", body, this.settings.key));
  }

  #begin(...parts) {
    showMessage(this.#part(".failure"));
    this.#part(".guide").hidden = true;
    this.#part(".foot").hidden = true;
    byId("text").hidden = false;
    byId("text").replaceChildren(...parts);
  }

  #end(text, { reason, failure, seconds }) {
    const summary = summarize(text.chunks, reason, seconds, text.sampling);
    const isEmpty = text.chunks.length === 0;
    const showsFailure = failure !== null && !this.settings.refuse(failure);
    byId("text").hidden = this.#part(".foot").hidden = isEmpty;
    this.#part(".guide").hidden = !isEmpty || showsFailure;
    this.#part(".done").textContent = summary;
    if (showsFailure) showMessage(this.#part(".failure"), failure.message);
    if (!failure) announce(`${summary}. Chunks can be opened: Tab to the text, then arrow keys and Enter.`);
  }

  #part(selector) {
    return this.section.querySelector(selector);
  }
}
