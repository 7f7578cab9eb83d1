"use strict";
// The page reads well without this. Tables of class `sortable` sort by a column, and arrows move
// through the passage, which then is one stop of the Tab key instead of one a token.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      const text = (row) => row.cells[column].textContent.trim();
      const order = (a, b) => {
        const [x, y] = [text(a), text(b)];
        if (!x || !y) return !x - !y; // empty cells last, either way
        return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
      };
      body.append(...[...body.rows].sort(order));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = sign > 0 ? "ascending" : "descending";
    });
  });
}
const tokens = [...document.querySelectorAll(".tok")];
tokens.forEach((token, place) => {
  token.tabIndex = place ? -1 : 0;
  token.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") token.blur();
    const next = step && tokens[place + step];
    if (!next) return;
    event.preventDefault();
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
});
