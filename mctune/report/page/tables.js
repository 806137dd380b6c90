// Tables whose headings sort them, by each cell's own value.
"use strict";
const sorting = (() => {
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return Number.isNaN(x) || Number.isNaN(y) ? String(a).localeCompare(String(b)) : x - y;
  };
  const turn = (head) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    return down ? -1 : 1;
  };
  for (const made of document.querySelectorAll("table.sortable")) {
    const body = made.tBodies[0];
    [...made.tHead.rows[0].cells].forEach((head, place) => head.firstChild.addEventListener("click", () => {
      const sign = turn(head);
      const lines = [...body.rows];
      lines.sort((a, b) => sign * compare(a.cells[place].dataset.value, b.cells[place].dataset.value));
      body.append(...lines);
    }));
  }
  return { compare, turn };
})();
