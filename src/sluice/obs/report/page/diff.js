// Which tokens of two answers have no partner in the other, in the order of both.

const CELLS = 4e6; // beyond this many, only the common start and end are matched

/** Sets of the tokens of `left` and `right` that are not in their longest common subsequence, by what they spell. */
function unlike(left, right) {
  const key = token => `${token.text ?? token.bytes ?? token.id}`;
  const a = left.map(key);
  const b = right.map(key);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const n = a.length - start - end;
  const m = b.length - start - end;
  const keptA = new Set();
  const keptB = new Set();
  if (n * m <= CELLS) {
    const width = m + 1;
    const table = new Uint32Array((n + 1) * width);
    for (let i = n - 1; i >= 0; i--)
      for (let j = m - 1; j >= 0; j--)
        table[i * width + j] = a[start + i] === b[start + j] ? table[(i + 1) * width + j + 1] + 1 : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    for (let i = 0, j = 0; i < n && j < m; ) {
      if (a[start + i] === b[start + j]) {
        keptA.add(start + i++);
        keptB.add(start + j++);
      } else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
      else j++;
    }
  }
  const rest = (tokens, kept) => new Set(tokens.filter((_, index) => index >= start && index < tokens.length - end && !kept.has(index)));
  return [rest(left, keptA), rest(right, keptB)];
}
