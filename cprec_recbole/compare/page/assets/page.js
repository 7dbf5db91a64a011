// The pickers, the legend and the table of the page. Pictures come ready from Python; here they get the
// page's colours and are handed to plotly.
"use strict";
(() => {
  const cells = JSON.parse(document.getElementById("study").textContent);
  const picks = Object.fromEntries(
    [...document.querySelectorAll("[data-pick]")].map((select) => [select.dataset.pick, select]));
  const plots = [...document.querySelectorAll("[data-picture]")];
  const legend = [...document.querySelectorAll("[data-contender]")];
  const everyone = document.getElementById("toggle-all");
  const hidden = new Set();
  const config = {
    displaylogo: false, responsive: true, displayModeBar: "hover",
    modeBarButtons: [["toImage"]], toImageButtonOptions: { format: "svg" },
  };

  const unique = (values) => [...new Set(values)];

  // Fill a picker, keeping its choice where that is still there.
  function fill(name, values, text = (value) => value) {
    const select = picks[name];
    const before = select.value;
    select.replaceChildren(...values.map((value) => new Option(text(value), value)));
    if (values.includes(before)) select.value = before;
    select.parentElement.hidden = values.length === 1 && !["dataset", "model"].includes(name);
    return select.value;
  }

  function currentCell() {
    let left = cells;
    for (const name of ["dataset", "model", "length"]) {
      const value = fill(name, unique(left.map((cell) => cell[name])), (v) => v || "–");
      left = left.filter((cell) => cell[name] === value);
    }
    return left[0];
  }

  // The colours of the page now, in place of the variables that pictures name.
  function painted(picture) {
    const style = getComputedStyle(document.documentElement);
    return JSON.parse(JSON.stringify(picture), (key, value) =>
      typeof value === "string" && /^var\(--[\w-]+\)$/.test(value)
        ? style.getPropertyValue(value.slice(4, -1)).trim() : value);
  }

  function pictureOf(cell, name) {
    const found = cell.pictures[name];
    if (name === "size") return found[picks.size.value];
    return name === "latency" ? found : found[picks.ratio.value];
  }

  function draw(cell, plot) {
    const picture = pictureOf(cell, plot.dataset.picture);
    plot.hidden = !picture;
    plot.nextElementSibling.hidden = Boolean(picture);
    if (!picture) return Plotly.purge(plot);
    const { data, layout } = painted(picture);
    for (const trace of data) trace.visible = !hidden.has(trace.meta);
    return Plotly.react(plot, data, layout, config);
  }

  function showParts(cell) {
    const parts = cell.parts[picks.ratio.value] || [];
    document.querySelector(".part-names").replaceChildren(...parts.flatMap(([name, shade]) => {
      const label = document.createElement("span");
      label.append(Object.assign(document.createElement("i"), { className: `part-${shade}` }), name);
      return [label, " "];
    }));
  }

  function showRows(cell) {
    const all = document.getElementById("all-rows").checked;
    const index = String(cells.indexOf(cell));
    document.body.classList.toggle("all", all);
    for (const row of document.querySelectorAll("[data-cell]")) {
      row.hidden = !all && row.dataset.cell !== index;
    }
  }

  function update() {
    const cell = currentCell();
    fill("ratio", cell.ratios, (ratio) => (ratio ? `÷ ${ratio}` : "–"));
    fill("size", Object.keys(cell.pictures.size).filter((name) => cell.pictures.size[name]));
    document.querySelector(".cell-words").textContent = cell.words;
    for (const button of legend) button.disabled = !cell.contenders.includes(button.dataset.contender);
    for (const plot of plots) draw(cell, plot);
    showParts(cell);
    showRows(cell);
  }

  function show(button, shown) {
    button.setAttribute("aria-pressed", String(shown));
    if (shown) hidden.delete(button.dataset.contender); else hidden.add(button.dataset.contender);
  }

  function toggle(buttons, shown) {
    for (const button of buttons) show(button, shown);
    everyone.textContent = legend.every((b) => hidden.has(b.dataset.contender)) ? "show all" : "hide all";
    update();
  }

  const collator = new Intl.Collator("en", { numeric: true });

  // Sort by a column; what was not measured comes last either way.
  function sort(heading) {
    const column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = heading.closest("table").tBodies[0];
    const value = (row) => row.cells[column].dataset.value;
    const numbers = body.rows[0].cells[column].classList.contains("num");
    const compare = (a, b) => numbers ? Number(a) - Number(b) : collator.compare(a, b);
    body.append(...[...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return down ? compare(y, x) : compare(x, y);
    }));
  }

  for (const select of Object.values(picks)) select.addEventListener("change", update);
  for (const button of legend) {
    button.addEventListener("click", () => toggle([button], hidden.has(button.dataset.contender)));
  }
  everyone.addEventListener("click", () => toggle(legend, everyone.textContent === "show all"));
  for (const heading of document.querySelectorAll(".sortable thead th")) {
    heading.firstElementChild.addEventListener("click", () => sort(heading));
  }
  document.getElementById("all-rows").addEventListener("change", update);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
  update();
})();
