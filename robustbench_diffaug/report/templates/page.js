"use strict";
const table = document.querySelector("table.sortable");
if (table) {
  const [spans, heads] = table.tHead.rows;
  const headers = [...heads.cells];
  const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
  // Complete values first, then partial ones, then none, whatever the direction.
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.dataset.published ?? "";
    const number = column === 0 ? 0 : { inf: Infinity, "-inf": -Infinity }[text] ?? Number(text || 0);
    return { order: Number(cell.dataset.order ?? 0), number, text: column === 0 ? cell.dataset.name : "" };
  };
  const sort = (header) => {
    const column = headers.indexOf(header);
    const best = header.dataset.first;
    const opposite = best === "descending" ? "ascending" : "descending";
    const direction = header.getAttribute("aria-sort") === best ? opposite : best;
    const sign = direction === "ascending" ? 1 : -1;
    for (const body of table.tBodies) {  // published rows stay beneath the measured ones
      const keyed = [...body.rows].map((row) => [keyOf(row, column), row]);
      keyed.sort(([a], [b]) => a.order - b.order ||
        sign * (a.number < b.number ? -1 : a.number > b.number ? 1 : a.text.localeCompare(b.text)));
      body.append(...keyed.map(([, row]) => row));
    }
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
  };
  for (const header of headers) header.querySelector("button").addEventListener("click", () => sort(header));

  const choose = document.querySelector(".choose");
  const filter = document.getElementById("filter");
  const count = document.getElementById("filter-count");
  choose.hidden = false;
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].dataset.name.toLowerCase().includes(wanted);
    count.textContent = wanted ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
  });

  let first = 1;
  const ranges = [...spans.cells].slice(1).map((span) => [span, first, first += span.colSpan]);
  for (const box of choose.querySelectorAll("[data-axis]")) {
    const show = () => {
      const [span, from, to] = ranges[box.dataset.axis];
      span.hidden = !box.checked;
      for (const row of [heads, ...rows]) {
        for (let column = from; column < to; column++) row.cells[column].hidden = !box.checked;
      }
    };
    box.addEventListener("change", show);
    if (!box.checked) show();  // a browser may remember what was unchecked
  }
}

// On paper nothing can be unfolded or scrolled: what is folded opens, and a table wider than a page goes on below itself.
const PAPER = 1010;  // of A4 across without its margins, in CSS pixels; charts stand two by two
let folded = [];
let split = [];
const across = (row) => {  // each cell of a row, with the columns that it spans
  let start = 0;
  return [...row.cells].map((cell) => [cell, start, start += cell.colSpan]);
};
const piece = (whole, from, to) => {
  const made = whole.cloneNode(true);
  for (const row of [...made.rows]) {
    for (const [cell, start, end] of across(row)) {
      const kept = Math.min(end, to) - Math.max(start, from);
      if (start === 0) continue;
      if (kept <= 0) cell.remove();
      else cell.colSpan = kept;
    }
  }
  for (const node of made.querySelectorAll("[id]")) node.removeAttribute("id");
  for (const button of made.querySelectorAll("button")) button.replaceWith(...button.childNodes);
  made.classList.add("piece");
  return made;
};
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
  const shrink = 0.7;  // letters on paper are so much smaller than on screen
  for (const whole of document.querySelectorAll(".scroll > table")) {
    const widths = [...whole.rows[whole.tHead.rows.length - 1].cells].map((cell) => shrink * cell.offsetWidth);
    const paper = whole.closest(".charts") ? PAPER / 2 - 10 : PAPER;
    if (widths.reduce((sum, width) => sum + width, 0) <= paper) continue;
    const pieces = [];
    for (let from = 1; from < widths.length;) {
      let to = from + 1;
      for (let room = paper - widths[0] - widths[from]; to < widths.length && room >= widths[to]; to++) room -= widths[to];
      pieces.push(piece(whole, from, to));
      from = to;
    }
    whole.after(...pieces);
    whole.hidden = true;
    split.push([whole, pieces]);
  }
});
addEventListener("afterprint", () => {
  for (const [whole, pieces] of split) {
    whole.hidden = false;
    for (const part of pieces) part.remove();
  }
  for (const details of folded) details.open = false;
  [folded, split] = [[], []];
});
