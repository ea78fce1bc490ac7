// The form as a request, and as an address that brings the same form back.

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"];
const IN_ADDRESS = ["prompt", "mode", "seed", "num_neighbours", "stop", "rerank", ...NUMBERS];
const MAX_RANDOM_SEED = 2 ** 31;

/**
 * The body of a completion request, less `retrieval.enabled`. What is left empty is left out, so that the service's
 * own defaults apply; but the seed is chosen here, so that two runs can share it and it can be shown.
 */
export function requestOf(form) {
  const fields = new FormData(form);
  const body = { prompt: fields.get("prompt"), stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    if (fields.get(name)) body[name] = Number(fields.get(name));
  }
  body.seed = fields.get("seed") ? Number(fields.get("seed")) : Math.floor(Math.random() * MAX_RANDOM_SEED);
  const stop = stopStrings(fields.get("stop"));
  if (stop.length) body.stop = stop;
  body.retrieval = {};
  if (fields.get("num_neighbours")) body.retrieval.num_neighbours = Number(fields.get("num_neighbours"));
  if (fields.get("rerank")) body.retrieval.rerank = fields.get("rerank");
  return body;
}

// "\n\n|END" is two texts; \n and \t are a line's end and a tab.
function stopStrings(field) {
  return field
    .split("|")
    .filter((text) => text)
    .map((text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
}

/** Make the address one that brings this form back: after the #, which browsers keep to themselves. */
export function keepInAddress(form) {
  const kept = new URLSearchParams();
  for (const [name, value] of new FormData(form)) {
    if (IN_ADDRESS.includes(name) && value) kept.set(name, value);
  }
  history.replaceState(null, "", `#${kept}`);
}

/** Fill the form from the address. Nothing is started: a link must not make anyone's browser ask anything. */
export function fillFromAddress(form) {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    const field = IN_ADDRESS.includes(name) && form.elements.namedItem(name);
    if (field) field.value = value;
  }
}
