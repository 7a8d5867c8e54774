// The opened chunk: what it took to sample it, and what else could have come there.

import { post } from "/page/api.js";
import { byId, make, showMessage } from "/page/dom.js";
import { isExact, describeChunk, describePool, percent, TEMPERATURES } from "/page/words.js";

const MOST_CANDIDATES = 10;

export class Inspector {
  constructor(about, settings) {
    this.about = about;
    this.settings = settings;
    this.text = null;
    this.number = 0;
    this.abortController = null;
    byId("close").addEventListener("click", () => this.close());
    byId("before").addEventListener("click", () => this.#step(-1));
    byId("after").addEventListener("click", () => this.#step(1));
  }

  open(text, number) {
    if (this.text !== text) this.text?.mark();
    this.text = text;
    this.number = number;
    text.mark(number);
    byId("legend").hidden = true;
    byId("chunk").hidden = false;
    this.#describe(text.chunks[number]);
    text.buttons[number].scrollIntoView({ block: "nearest" });
    this.#askForPool();
  }

  // Back to the chunk in the text.
  close() {
    if (!this.text) return;
    const { text, number } = this;
    this.forget();
    if (text.element.isConnected) text.visit(number);
  }

  forget() {
    this.abortController?.abort();
    this.text?.mark();
    this.text = null;
    byId("chunk").hidden = true;
    byId("legend").hidden = false;
  }

  #step(by) {
    const number = this.number + by;
    if (this.text?.chunks[number]) this.open(this.text, number);
  }

  #describe(chunk) {
    const { text, number } = this;
    byId("chunk-title").textContent = `Chunk ${number + 1} of ${text.chunks.length}`;
    byId("before").setAttribute("aria-disabled", String(number === 0));
    byId("after").setAttribute("aria-disabled", String(number === text.chunks.length - 1));
    byId("chunk-tokens").replaceChildren(...this.#tokens(chunk));
    byId("chunk-facts").textContent = describeChunk(chunk, text.sampling, this.about);
    byId("pool").hidden = true;
    showMessage(byId("pool-failure"));
    showMessage(byId("pool-facts"), "Drawing alternatives …");
  }

  async #askForPool() {
    const { text, number, about } = this;
    this.abortController?.abort();
    const abortController = (this.abortController = new AbortController());
    const temperatures = [...new Set([...TEMPERATURES, text.sampling.temperature])].sort((a, b) => b - a);
    const body = {
      model: about.model,
      ...text.source,
      num_thoughts: text.sampling.thoughts,
      written: text.chunks.slice(0, number).flatMap((chunk) => chunk.token_ids),
      num_draws: about.draws,
      temperatures: temperatures.filter((value) => value === 0 || Math.ceil(1 / value) <= about.draws),
      most: MOST_CANDIDATES,
      seed: 0,
    };
    if (this.#isWhole(text.chunks[number])) body.chunk = text.chunks[number].token_ids;
    try {
      const pool = await (await post("/v1/calm/pool", body, this.settings.key, abortController.signal)).json();
      this.#show(pool, text.chunks[number], text.sampling);
    } catch (error) {
      if (error.name === "AbortError") return;
      showMessage(byId("pool-facts"));
      showMessage(byId("pool-failure"), error.message);
    }
  }

  #show(pool, chunk, sampling) {
    const written = String(chunk.token_ids);
    const rows = pool.candidates.map((candidate) =>
      this.#row(candidate, pool, sampling, String(candidate.token_ids) === written));
    byId("pool").replaceChildren(tableHead(pool, sampling), make("tbody", {}, ...rows));
    byId("pool").hidden = false;
    showMessage(byId("pool-facts"), describePool(pool, sampling));
  }

  #row(candidate, pool, sampling, isWritten) {
    const name = make("th", { scope: "row" }, make("span", {}, ...this.#tokens(candidate)));
    if (isWritten) name.append(make("small", { textContent: "in the text" }));
    const draws = make("td", { className: "draws", textContent: candidate.count });
    draws.style.setProperty("--share", candidate.count / pool.candidates[0].count);
    const shares = (isExact(pool, sampling) && candidate.probabilities) || candidate.chances;
    const cells = shares.map((share, column) => {
      const cell = make("td", { textContent: share === null ? "–" : percent(share), className: "share" });
      cell.style.setProperty("--share", share ?? 0);
      cell.classList.toggle("chosen", pool.temperatures[column] === sampling.temperature);
      return cell;
    });
    return make("tr", { className: isWritten ? "written" : "" }, name, draws, ...cells);
  }

  // False where the text had room only for a part of the chunk.
  #isWhole(chunk) {
    return chunk.token_ids.length === this.about.chunk_size || this.text.hasEnd(chunk);
  }

  #tokens({ token_ids, tokens }) {
    return token_ids.map((token, index) => this.about.eos_token_ids.includes(token)
      ? make("span", { className: "token end", textContent: "end" })
      : make("span", { className: "token", textContent: tokens[index].replaceAll("\n", "⏎") }));
  }
}

function tableHead(pool, sampling) {
  const temperatures = pool.temperatures.map((temperature) => {
    const cell = make("th", { scope: "col" }, make("span", { textContent: temperature }));
    if (temperature === sampling.temperature) {
      cell.className = "chosen";
      cell.setAttribute("aria-current", "true");
      cell.append(make("small", { textContent: "chosen" }));
    }
    return cell;
  });
  return make("thead", {},
    make("tr", {},
      make("th", { scope: "col", rowSpan: 2, textContent: "Candidate" }),
      make("th", { scope: "col", rowSpan: 2, textContent: "Draws", className: "draws" }),
      make("th", { scope: "colgroup", colSpan: temperatures.length, textContent: "Probability in % at T =" })),
    make("tr", {}, ...temperatures));
}
