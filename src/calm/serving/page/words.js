// What the page says of a model, its chunks and its pools; words fit the head and the number.

export const TEMPERATURES = [1, 0.7, 0.5, 0.3, 0];

export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

// How a request will be sampled: by what the server does where it is not told.
export function samplerOf(about, chosen, temperature) {
  const own = about.lowest_temperature < 1 && temperature >= about.lowest_temperature;
  const sampler = chosen || (own ? "head" : "exact");
  return sampler === "exact" && temperature === 0 ? "pool" : sampler;
}

export function ofModel(about) {
  return `${about.head.replaceAll("_", " ")} head, ${count(about.chunk_size, "token")} per chunk`;
}

export function ofChunks(about) {
  const size = about.chunk_size;
  return size === 1 ? "one token at a time" : `in chunks of ${size} tokens`;
}

// how: {sampler, temperature}
export function ofChunk(chunk, how, about) {
  const { sampler, temperature } = how;
  const at = `T = ${temperature}`;
  if (sampler === "head") {
    if (about.head !== "sequential") return `A single draw of the head, at ${at}.`;
    if (temperature === 0) return "At T = 0 the head takes the likeliest token at each place.";
    const drawn = about.chunk_size === 1 ? "Drawn" : "Drawn token by token";
    return temperature === 1 ? `${drawn} at ${at}.` : `${drawn} at ${at}: each token’s distribution is sharpened.`;
  }
  if (temperature === 1) return `A single draw of the head, at ${at}.`;
  if (chunk.num_draws === 1) return "The only draw: with just one, there is nothing to choose from.";
  const same = Math.round(chunk.agreement * chunk.num_draws);
  const share = `${same} of them ${same === 1 ? "was" : "were"} this chunk`;
  if (chunk.fell_back) {
    return `${count(chunk.num_draws, "draw")} gave no decision at ${at}, so the most frequent ones decided; ${share}.`;
  }
  if (sampler === "pool" && temperature === 0) {
    return `The most frequent chunk of ${count(chunk.num_draws, "draw")}: ${share}.`;
  }
  if (sampler === "pool") return `Chosen at ${at} from a pool of ${count(chunk.num_draws, "draw")}; ${share}.`;
  return `Decided at ${at} after ${count(chunk.num_draws, "draw")}; ${share}.`;
}

export function isExact(pool, how) {
  return how.sampler === "head" && pool.candidates.some((candidate) => candidate.probabilities);
}

export function ofPool(pool, how) {
  const drawn = `${count(pool.num_draws, "fresh draw")} at T = 1 gave ${count(pool.num_different, "different chunk")}.`;
  if (isExact(pool, how)) {
    return `${drawn} The probabilities are exact: the head computes them, and applies the temperature to each token.`;
  }
  if (how.sampler === "head") {
    return `${drawn} The probabilities are those of the pool rule; this head applies the temperature in its own way.`;
  }
  return `${drawn} The probabilities are estimated from how often each was drawn.`;
}

export function ofText(chunks, reason, seconds, how) {
  const draws = chunks.reduce((sum, chunk) => sum + chunk.num_draws, 0);
  const parts = [count(chunks.length, "chunk")];
  if (how.thoughts) parts.unshift(count(how.thoughts, "thought"));
  if (how.sampler !== "head" && draws > chunks.length) parts.push(count(draws, "draw"));
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
