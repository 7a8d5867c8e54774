// Talks with a model whose tokenizer has a chat template.

import { ChunkedText } from "/page/chunks.js";
import { announce, byId, copy, make, showMessage } from "/page/dom.js";
import { chunkPhrase, summarize } from "/page/words.js";
import { Writer } from "/page/writing.js";

export class Chat {
  constructor(about, settings, inspector) {
    Object.assign(this, { about, settings, inspector, section: byId("chat"), history: [] });
    this.writer = new Writer(this.#part("form"));
    this.guide = "Say something to begin. The model answers " + chunkPhrase(about) + "; open any chunk to see what else could have come.";
    showMessage(this.#part(".guide"), this.guide);
    this.#part("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    byId("message").addEventListener("input", () => showMessage(byId("message-wrong")));
    byId("new").addEventListener("click", () => this.#clear());
  }

  async submit() {
    if (this.writer.isBusy || !this.settings.check()) return;
    const message = byId("message").value;
    if (!message.trim()) {
      showMessage(byId("message-wrong"), "Write a message first.");
      byId("message").focus();
      return;
    }
    const system = byId("system").value.trim() ? [{ role: "system", content: byId("system").value }] : [];
    const userMessage = { role: "user", content: message };
    const text = new ChunkedText({ messages: [...system, ...this.history, userMessage] }, this.settings.sampling,
      this.about.eos_token_ids, (...opened) => this.inspector.open(...opened));
    const turns = [turn("user", "You", message), turn("assistant", this.about.model, text.element)];
    this.#begin(turns);
    const body = { model: this.about.model, ...this.settings.arguments };
    const outcome = await this.writer.fill(text, "/v1/chat/completions", body, this.settings.key);
    this.#end(userMessage, text, turns, outcome);
  }

  #begin(turns) {
    showMessage(this.#part(".failure"));
    showMessage(this.#part(".guide"));
    byId("new").hidden = true;
    byId("message").value = "";
    byId("turns").append(...turns);
    this.#part("form").scrollIntoView({ block: "nearest" });
  }

  #end(userMessage, text, turns, { reason, failure, seconds }) {
    if (failure && !this.settings.refuse(failure)) showMessage(this.#part(".failure"), failure.message);
    if (text.chunks.length === 0) {
      // Nothing came of it, so the message goes back to where it was written.
      for (const element of turns) element.remove();
      byId("message").value ||= userMessage.content;
    } else {
      this.history.push(userMessage, { role: "assistant", content: text.content });
      const done = summarize(text.chunks, reason, seconds, text.sampling);
      const button = make("button", { type: "button", className: "quiet copy", textContent: "Copy" });
      button.addEventListener("click", () => copy(text.content, button));
      turns[1].append(make("div", { className: "foot" }, make("p", { className: "done", textContent: done }), button));
      if (!failure) announce(`${done}. ${text.content}`);
    }
    this.#part(".hint").hidden = byId("new").hidden = this.history.length === 0;
    if (this.history.length === 0) showMessage(this.#part(".guide"), this.guide);
    this.#part("form").scrollIntoView({ block: "nearest" });
  }

  #clear() {
    this.history = [];
    this.inspector.forget();
    byId("turns").replaceChildren();
    this.#part(".hint").hidden = byId("new").hidden = true;
    showMessage(this.#part(".failure"));
    showMessage(this.#part(".guide"), this.guide);
    byId("message").focus();
  }

  #part(selector) {
    return this.section.querySelector(selector);
  }
}

function turn(role, speaker, content) {
  return make("li", { className: role }, make("p", { className: "speaker", textContent: speaker }),
    make("div", { className: "bubble" }, content));
}
