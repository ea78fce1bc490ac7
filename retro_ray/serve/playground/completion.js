// What has arrived of one streamed completion, divided into passages.

export class Completion {
  finishReason = null;
  usage = null;
  // The service counts characters as code points, JavaScript strings in UTF-16 units.
  #characters = [];
  #citations = new Map();

  /** Take in one chunk of the stream. */
  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.#characters.push(...(choice.text ?? ""));
    if (choice.finish_reason) {
      this.finishReason = choice.finish_reason;
      this.#citations.clear(); // the complete list follows
    }
    for (const citation of choice.citations ?? []) this.#citations.set(citation.chunk, citation);
  }

  get numLookups() {
    return this.#citations.size;
  }

  /** The text in order, as [{text, citation}]; citation is null where no neighbours were in view. */
  passages() {
    const cited = [...this.#citations.values()].sort((a, b) => a.text_start - b.text_start || a.chunk - b.chunk);
    const passages = [];
    let position = 0;
    const add = (end, citation) => {
      const text = this.#characters.slice(position, end).join("");
      if (text || citation) passages.push({ text, citation });
      position = Math.max(position, end);
    };
    cited.forEach((citation, i) => {
      add(citation.text_start, null);
      add(citation.text_end ?? cited[i + 1]?.text_start ?? this.#characters.length, citation);
    });
    add(this.#characters.length, null);
    return passages;
  }
}
