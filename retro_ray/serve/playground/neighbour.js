// A neighbour as a card, and what is said when shards did not answer. Whatever a document holds is shown as text.

import { sharedRuns, showRuns } from "./overlap.js";

/** An element with a class and a text. */
export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** A chunk of the database as an <li>; `markShared(text, fewest)` marks anew what it shares with `text`. */
export class NeighbourCard {
  #text;
  #whole;
  #found;
  #continuation;

  constructor(neighbour) {
    this.element = element("li", "neighbour");
    const name = neighbour.title || neighbour.document_id;
    const title = breakable(element("cite", "title"), name);
    title.title = `Document ${neighbour.document_id}`;
    const head = element("p", "head");
    const distance = element("span", "distance", neighbour.distance.toFixed(2));
    distance.title = "Squared distance of the two chunks' embeddings: less is nearer";
    distance.prepend(element("span", "unseen", "distance "));
    head.append(title, distance);
    this.element.append(head);
    if (neighbour.source) this.element.append(breakable(element("p", "source"), neighbour.source));
    this.#text = compact(neighbour.text).trimStart();
    this.#whole = this.#text + compact(neighbour.continuation).trimEnd();
    this.#found = element("span", "found", this.#text);
    this.#continuation = element("span", "continuation", this.#whole.slice(this.#text.length));
    this.#continuation.title = "What follows the chunk that was found in its document; the model sees both";
    const body = element("p", "body");
    body.append(this.#found, this.#continuation);
    this.element.append(body);
  }

  /** The chunk and its continuation as one text. */
  get whole() {
    return this.#whole;
  }

  markShared(text, fewest) {
    const runs = sharedRuns(this.#whole, [text], fewest);
    const boundary = this.#text.length;
    showRuns(this.#found, this.#text, within(runs, 0, boundary));
    showRuns(this.#continuation, this.#whole.slice(boundary), within(runs, boundary, this.#whole.length));
  }
}

/** A text without its blank lines, where there is little room. */
export function compact(text) {
  return text.replaceAll(/\n(?:[ \t]*\n)+/g, "\n");
}

// Names of files and modules may be broken after their separators.
function breakable(into, name) {
  for (const part of name.split(/(?<=[./_\-])/)) into.append(part, document.createElement("wbr"));
  return into;
}

// The parts of `runs` in [from, to), counted from there: a run may go over the end of a chunk.
function within(runs, from, to) {
  return runs
    .filter(({ start, end }) => end > from && start < to)
    .map((run) => ({ ...run, start: Math.max(run.start, from) - from, end: Math.min(run.end, to) - from }));
}

/** A line about the shards that did not answer, or null when all did. */
export function missingShardsNote(shards) {
  if (!shards?.length) return null;
  const which = shards.length === 1 ? `Shard ${shards[0]}` : `Shards ${shards.join(", ")}`;
  return element("p", "missing", `${which} did not answer: nearer neighbours may be missing.`);
}
