// The fields beside the prompt: their ranges, the arguments they set, and error messages next to them.

import { byId, make, showMessage } from "/page/dom.js";
import { samplerOf } from "/page/words.js";

// Argument of a request -> the field that shows why the server refused it.
const FIELDS = {
  max_tokens: "tokens", max_completion_tokens: "tokens", max_draws: "draws", num_draws: "draws",
  num_thoughts: "thoughts", seed: "seed", sampler: "sampler", temperature: "temperature", key: "key", prompt: "prompt",
};
const INITIAL_MAX_TOKENS = 120;

export class Settings {
  constructor(about) {
    this.about = about;
    byId("temperature").value = about.temperature;
    byId("tokens").max = about.max_tokens;
    byId("tokens").value = Math.min(INITIAL_MAX_TOKENS, about.max_tokens);
    byId("draws").max = about.max_draws;
    byId("draws").value = about.draws;
    // Only models that were trained to think take any.
    byId("thoughts-field").hidden = byId("thoughts").disabled = about.num_thoughts === null;
    byId("thoughts").max = about.max_thoughts;
    byId("thoughts").value = about.num_thoughts;
    byId("key-field").hidden = !about.needs_key;
    const samplers = about.lowest_temperature < 1 ? ["head", "exact", "pool"] : ["exact", "pool"];
    byId("sampler").append(...samplers.map((name) => make("option", { value: name, textContent: name })));
    byId("more").addEventListener("click", () => this.unfold(byId("settings").hidden));
    for (const name of ["temperature", "sampler"]) byId(name).addEventListener("input", () => this.#update());
    for (const name of new Set(Object.values(FIELDS))) {
      byId(name).setAttribute("aria-describedby", `${name}-wrong`);
      byId(name).addEventListener("input", () => this.#showError(name));
    }
    this.#update();
    if (about.needs_key) this.unfold(true);
  }

  get key() {
    return byId("key").value;
  }

  get sampling() {
    const temperature = Number(byId("temperature").value);
    const sampling = { temperature, sampler: samplerOf(this.about, byId("sampler").value, temperature) };
    return byId("thoughts").disabled ? sampling : { ...sampling, thoughts: Number(byId("thoughts").value) };
  }

  get arguments() {
    const { temperature, thoughts } = this.sampling;
    const chosen = { temperature, num_thoughts: thoughts, max_tokens: Number(byId("tokens").value) };
    if (!byId("draws").disabled) chosen.max_draws = chosen.num_draws = Number(byId("draws").value);
    if (byId("sampler").value) chosen.sampler = byId("sampler").value;
    if (byId("seed").value) chosen.seed = Number(byId("seed").value);
    return chosen;
  }

  unfold(isOpen) {
    byId("settings").hidden = !isOpen;
    byId("more").setAttribute("aria-expanded", String(isOpen));
  }

  // Whether all fields are valid; if not, the first invalid one shows why.
  check() {
    for (const name of ["tokens", "draws", "thoughts", "seed"]) {
      const field = byId(name);
      if (field.disabled || field.validity.valid) continue;
      const range = `A whole number from ${field.min} to ${Number(field.max).toLocaleString("en")}.`;
      this.#showError(name, name === "seed" ? "A whole number of up to 15 digits, or empty for a random one." : range);
      return false;
    }
    return true;
  }

  // Shows a refusal at the field it is about; returns whether there is such a field.
  refuse(refusal) {
    const name = FIELDS[refusal.field];
    if (!name || byId(name).closest("[hidden]:not(#settings)")) return false;
    this.#showError(name, refusal.message);
    return true;
  }

  #showError(name, sentence = "") {
    const field = byId(name);
    showMessage(byId(`${name}-wrong`), sentence);
    if (!sentence) {
      field.removeAttribute("aria-invalid");
      return;
    }
    field.setAttribute("aria-invalid", "true");
    if (byId("settings").contains(field)) this.unfold(true);
    field.focus();
  }

  #update() {
    const { temperature, sampler } = this.sampling;
    byId("temperature-shown").textContent = temperature.toFixed(2);
    byId("draws").disabled = sampler === "head" || temperature === 1;
    byId("draws-note").hidden = !byId("draws").disabled;
  }
}
