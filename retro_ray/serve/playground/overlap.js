// Which words two texts share. Runs of common words say more than single ones: as in the paper's figures, what is
// looked for is how long a stretch of one text occurs in another.

const WORD = /[\p{L}\p{N}_]+/gu;
const SHORTEST_LONE_WORD = 4; // letters; "a" and "the" say nothing by themselves

function wordsOf(text) {
  return Array.from(text.matchAll(WORD), (match) => ({
    word: match[0].toLowerCase(),
    start: match.index,
    end: match.index + match[0].length,
  }));
}

// For each word of `here`, the length in words of the longest run that starts at it and occurs in `there`.
function longestRuns(here, there) {
  const longest = new Array(here.length).fill(0);
  let after = new Array(there.length + 1).fill(0); // after[j]: the run that starts at here[i + 1] and there[j]
  for (let i = here.length - 1; i >= 0; i--) {
    const current = new Array(there.length + 1).fill(0);
    for (let j = there.length - 1; j >= 0; j--) {
      if (here[i].word !== there[j].word) continue;
      current[j] = after[j + 1] + 1;
      longest[i] = Math.max(longest[i], current[j]);
    }
    after = current;
  }
  return longest;
}

/**
 * The stretches of `text` that occur in one of `others` as runs of at least `fewest` words, whatever the case and the
 * punctuation between them: disjoint and ascending [{start, end, length}], positions in UTF-16 units, length in words.
 */
export function sharedRuns(text, others, fewest = 3) {
  const here = wordsOf(text);
  const lengths = new Array(here.length).fill(0); // of the longest run that each word is in
  for (const other of others) {
    longestRuns(here, wordsOf(other)).forEach((length, i) => {
      if (length < fewest || (length === 1 && here[i].word.length < SHORTEST_LONE_WORD)) return;
      for (let word = i; word < i + length; word++) lengths[word] = Math.max(lengths[word], length);
    });
  }
  const runs = [];
  here.forEach(({ start, end }, i) => {
    if (lengths[i] === 0) return;
    const last = runs.at(-1);
    if (last && i > 0 && lengths[i - 1] === lengths[i]) last.end = end;
    else runs.push({ start, end, length: lengths[i] });
  });
  return runs;
}

/** Put `text` into `element` with its `runs` marked; the longer a run, the stronger the mark. Text stays text. */
export function showRuns(element, text, runs) {
  const parts = [];
  let position = 0;
  for (const { start, end, length } of runs) {
    parts.push(text.slice(position, start));
    // A mark for each line: the indentation between two lines stays blank.
    for (const [i, line] of text.slice(start, end).split(/(\s*\n\s*)/).entries()) {
      parts.push(i % 2 ? line : marked(line, length));
    }
    position = end;
  }
  parts.push(text.slice(position));
  element.replaceChildren(...parts);
}

function marked(text, length) {
  const mark = document.createElement("mark");
  mark.dataset.run = length >= 8 ? "long" : length >= 5 ? "middle" : "short";
  mark.textContent = text;
  return mark;
}
