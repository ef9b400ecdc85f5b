"use strict";
// Tables that sort by a click on a heading, rows that can be filtered, tokens that can be looked into.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") !== "descending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = heading.classList.contains("number");
      const key = (row) => row.cells[column].dataset.value;
      const compare = (a, b) =>
        numeric ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b), undefined, { numeric: true });
      const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? -1 : 1) * compare(a, b));
      table.tBodies[0].append(...rows);
    });
  });
}

const filter = document.getElementById("filter");
filter?.addEventListener("input", () => {
  const words = filter.value.toLowerCase();
  for (const row of document.getElementById("hardest").tBodies[0].rows)
    row.hidden = !row.textContent.toLowerCase().includes(words);
});

const strips = JSON.parse(document.getElementById("data").textContent);
const detail = document.getElementById("detail");
function look(token) {
  const strip = token.parentElement;
  const place = [...strip.children].indexOf(token);
  const [loss, rank, best] = strips[strip.dataset.strip][place];
  const title = document.createElement("strong");
  title.textContent = token.textContent;
  const text = loss === null ? " has no target" : typeof loss === "string" ? ` costs ${loss}` : ` ${loss.toFixed(3)} nats, p = ${Math.exp(-loss).toPrecision(3)}, rank ${rank}`;
  const list = document.createElement("div");
  list.textContent = best.map(([name, p]) => `${name} ${(100 * p).toFixed(1)}%`).join("  ·  ");
  detail.replaceChildren(title, document.createTextNode(text), list);
}
for (const strip of document.querySelectorAll(".strip")) {
  const on = (event) => event.target.classList.contains("token") && look(event.target);
  strip.addEventListener("mouseover", on);
  strip.addEventListener("focusin", on);
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const next = step && event.target[step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
