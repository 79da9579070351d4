"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  // Complete values first, then partial ones, then none, whatever the direction.
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? "";
    const number = column === 0 ? 0 : { inf: Infinity, "-inf": -Infinity }[text] ?? Number(text || 0);
    return { order: Number(cell.dataset.order ?? 0), number, text: column === 0 ? text : "" };
  };
  const sort = (header) => {
    const column = headers.indexOf(header);
    const best = header.dataset.first;
    const opposite = best === "descending" ? "ascending" : "descending";
    const direction = header.getAttribute("aria-sort") === best ? opposite : best;
    const sign = direction === "ascending" ? 1 : -1;
    const keyed = [...body.rows].map((row) => [keyOf(row, column), row]);
    keyed.sort(([a], [b]) => a.order - b.order ||
      sign * (a.number < b.number ? -1 : a.number > b.number ? 1 : a.text.localeCompare(b.text)));
    body.append(...keyed.map(([, row]) => row));
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
  };
  for (const header of headers) header.querySelector("button").addEventListener("click", () => sort(header));
}
const filter = document.getElementById("filter");
if (filter) {
  const rows = [...document.querySelectorAll("table.sortable tbody tr")];
  const count = document.getElementById("filter-count");
  filter.parentElement.hidden = false;
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].dataset.value.toLowerCase().includes(wanted);
    count.textContent = wanted ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
  });
}
// On paper nothing can be unfolded.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details[data-print]:not([open])")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
