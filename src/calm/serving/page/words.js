// What the page says about a model, its chunks and its pools; it depends on the head, and on the numbers.

export const TEMPERATURES = [1, 0.7, 0.5, 0.3, 0];

export function count(number, singular, plural = `${singular}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? singular : plural}`;
}

// The sampler of a request: the chosen one, or the one that the server uses by default.
export function samplerOf(about, chosen, temperature) {
  const headCan = about.lowest_temperature < 1 && temperature >= about.lowest_temperature;
  const sampler = chosen || (headCan ? "head" : "exact");
  return sampler === "exact" && temperature === 0 ? "pool" : sampler;
}

export function describeModel(about) {
  return `${about.head.replaceAll("_", " ")} head, ${count(about.chunk_size, "token")} per chunk`;
}

export function chunkPhrase(about) {
  const size = about.chunk_size;
  return size === 1 ? "one token at a time" : `in chunks of ${size} tokens`;
}

// sampling: {sampler, temperature}
export function describeChunk(chunk, sampling, about) {
  const { sampler, temperature } = sampling;
  const atT = `at T = ${temperature}`;
  if (sampler === "head") {
    if (about.head !== "sequential") return `A single draw of the head, ${atT}.`;
    if (temperature === 0) return "At T = 0 the head takes the likeliest token at each place.";
    const drawn = about.chunk_size === 1 ? "Drawn" : "Drawn token by token";
    return temperature === 1 ? `${drawn} ${atT}.` : `${drawn} ${atT}: each token’s distribution is sharpened.`;
  }
  if (temperature === 1) return `A single draw of the head, ${atT}.`;
  if (chunk.num_draws === 1) return "The only draw: with just one, there is nothing to choose from.";
  const same = Math.round(chunk.agreement * chunk.num_draws);
  const share = `${same} of them ${same === 1 ? "was" : "were"} this chunk`;
  if (chunk.fell_back) {
    return `${count(chunk.num_draws, "draw")} gave no decision ${atT}, so the most frequent ones decided; ${share}.`;
  }
  if (sampler === "pool" && temperature === 0) {
    return `The most frequent chunk of ${count(chunk.num_draws, "draw")}: ${share}.`;
  }
  if (sampler === "pool") return `Chosen ${atT} from a pool of ${count(chunk.num_draws, "draw")}; ${share}.`;
  return `Decided ${atT} after ${count(chunk.num_draws, "draw")}; ${share}.`;
}

export function isExact(pool, sampling) {
  return sampling.sampler === "head" && pool.candidates.some((candidate) => candidate.probabilities);
}

export function describePool(pool, sampling) {
  const drawn = `${count(pool.num_draws, "fresh draw")} at T = 1 gave ${count(pool.num_different, "different chunk")}.`;
  if (isExact(pool, sampling)) {
    return `${drawn} The probabilities are exact: the head computes them, and applies the temperature to each token.`;
  }
  if (sampling.sampler === "head") {
    return `${drawn} The probabilities are those of the pool rule; this head applies the temperature in its own way.`;
  }
  return `${drawn} The probabilities are estimated from how often each was drawn.`;
}

export function summarize(chunks, reason, seconds, sampling) {
  const draws = chunks.reduce((sum, chunk) => sum + chunk.num_draws, 0);
  const parts = [count(chunks.length, "chunk")];
  if (sampling.thoughts) parts.unshift(count(sampling.thoughts, "thought"));
  if (sampling.sampler !== "head" && draws > chunks.length) parts.push(count(draws, "draw"));
  parts.push(seconds < 0.1 ? "<0.1 s" : `${seconds.toFixed(1)} s`);
  const why = { stop: "the model ended it", length: "token limit reached", stopped: "stopped" }[reason];
  return parts.concat(why ? [why] : []).join(" · ");
}

export function percent(share) {
  const percentage = 100 * share;
  if (percentage === 0) return "0";
  if (percentage < 0.1) return "<0.1";
  return percentage >= 99.95 ? "100" : percentage.toFixed(1);
}
