// One completion on the page: its text, passage by passage, and beside it the neighbours each was written with.

import { Completion } from "./completion.js";
import { NeighbourCard, compact, element, missingShardsNote } from "./neighbour.js";
import { sharedRuns, showRuns } from "./overlap.js";

const NUM_COLOURS = 8; // as in style.css
const MAX_PROMPT_SHOWN = 120; // characters
const MAX_QUERY_SHOWN = 100;

export class ResultView {
  completion = new Completion();
  #passages = [];
  #scheduled = false;
  #onLookup;

  /** Of the prompt only the end is shown. `onLookup(lookup, citation)` is called with each that is new on the page. */
  constructor(heading, prompt, onLookup = () => {}) {
    this.#onLookup = onLookup;
    this.element = element("article", "completion");
    this.element.append(element("h2", "", heading));
    this.text = element("div", "text");
    this.text.setAttribute("aria-busy", "true");
    this.text.append(element("span", "prompt", endOf(compact(prompt), MAX_PROMPT_SHOWN)));
    this.failure = element("p", "error");
    this.failure.setAttribute("role", "alert");
    this.failure.hidden = true;
    this.summary = element("p", "summary");
    this.element.append(this.text, this.failure, this.summary);
    this.lookups = element("ol", "lookups");
  }

  /** Take in one chunk of the stream; drawn with the next frame. */
  take(chunk) {
    this.completion.take(chunk);
    if (!this.#scheduled) {
      this.#scheduled = true;
      requestAnimationFrame(() => {
        this.#scheduled = false;
        this.#draw();
      });
    }
  }

  /** No more will come. `message` says what went wrong, if anything did. */
  end(summary, message = "") {
    this.#draw(); // frames pause in a tab that is not looked at
    this.text.setAttribute("aria-busy", "false");
    this.summary.textContent = summary;
    this.failure.textContent = message;
    this.failure.hidden = !message;
  }

  #draw() {
    const passages = this.completion.passages();
    let number = 0;
    passages.forEach(({ text, citation }, i) => {
      if (citation) number += 1;
      let view = this.#passages[i];
      if (view && view.chunk !== citation?.chunk) {
        for (const later of this.#passages.splice(i)) later.remove();
        view = undefined;
      }
      if (!view) {
        view = citation ? new CitedPassage(number, citation) : new PlainPassage();
        this.#passages.push(view);
        this.text.append(view.element);
        if (citation) {
          this.lookups.append(view.lookup);
          this.#onLookup(view.lookup, citation);
        }
      }
      view.update(text, citation);
    });
    for (const gone of this.#passages.splice(passages.length)) gone.remove();
  }
}

// The end of a text, from a word's beginning.
function endOf(text, maxLength) {
  if (text.length <= maxLength) return text;
  return `\u2026${text.slice(-maxLength).replace(/^\S*/, "")}`;
}

// Text that was written without neighbours.
class PlainPassage {
  element = element("span", "passage");

  update(text) {
    this.element.textContent = text;
  }

  remove() {
    this.element.remove();
  }
}

// Text and the neighbours it was written with: two elements of one colour, which point at each other.
class CitedPassage {
  #words;
  #query;
  #notes;
  #list;
  #shown = null;
  #citation = null;
  #cards = [];

  constructor(number, citation) {
    this.chunk = citation.chunk;
    this.element = this.#coloured(element("span", "passage"), number);
    this.element.id = `passage-${number}`;
    this.#words = element("span", "words");
    const toNeighbours = this.#numberLink(number, `neighbours-${number}`, `Neighbours of passage ${number}`);
    this.element.append(toNeighbours, this.#words);
    this.lookup = this.#coloured(element("li", "lookup"), number);
    this.lookup.id = `neighbours-${number}`;
    this.#query = element("span", "query");
    const head = element("h3");
    const toPassage = this.#numberLink(number, `passage-${number}`, `Passage ${number}`);
    head.append(toPassage, "looked up: ", this.#query);
    this.#notes = element("div");
    this.#list = element("ol", "neighbours");
    this.lookup.append(head, this.#notes, this.#list);
  }

  update(text, citation) {
    if (citation !== this.#citation) this.#showNeighbours(citation);
    else if (text === this.#shown) return;
    this.#citation = citation;
    this.#shown = text;
    showRuns(this.#words, text, sharedRuns(text, this.#cards.map((card) => card.whole)));
    for (const card of this.#cards) card.markShared(text);
  }

  remove() {
    this.element.remove();
    this.lookup.remove();
  }

  #showNeighbours(citation) {
    const query = citation.query.trim().replaceAll(/\s+/g, " ");
    this.#query.textContent = endOf(query, MAX_QUERY_SHOWN);
    this.#query.title = query;
    const missing = missingShardsNote(citation.missing_shards);
    this.#notes.replaceChildren(...(missing ? [missing] : []));
    this.#cards = citation.neighbours.map((neighbour) => new NeighbourCard(neighbour));
    this.#list.replaceChildren(...this.#cards.map((card) => card.element));
    if (!this.#cards.length) this.#notes.append(element("p", "missing", "Nothing was found."));
  }

  #coloured(made, number) {
    made.dataset.passage = number;
    made.dataset.colour = (number - 1) % NUM_COLOURS;
    made.tabIndex = -1;
    return made;
  }

  #numberLink(number, target, label) {
    const link = element("a", "number", String(number));
    link.href = `#${target}`;
    link.setAttribute("aria-label", label);
    return link;
  }
}
