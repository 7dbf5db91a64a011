// Pickers, pictures and sorting. Python gives figures; plotly draws and formats them.
"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const picks = Object.fromEntries(all("[data-pick]").map((select) => [select.dataset.pick, select]));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Set(); // contenders, in all pictures
  const short = (text) => (text.length > 24 ? `${text.slice(0, 23)}…` : text)
    .replace(/&/g, "&amp;").replace(/</g, "&lt;"); // plotly reads tags

  // Each contender has a colour of Okabe and Ito, which the colour-blind can tell apart, and a symbol.
  const colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"];
  const symbols = ["square", "diamond", "triangle-up", "triangle-down", "x", "pentagon", "hourglass"];
  const looks = new Map(STUDY.contenders.map((name, i) => [name, [colours[i % 5], symbols[i % 7]]]));
  looks.set("uncompressed", [null, "star"]).set("compressed", ["#D55E00", "circle"]);
  looks.set("recovered", ["#D55E00", "circle-open"]).set("recovered-int8", ["#D55E00", "cross"]);

  // A trace for each contender that has points here; `y` holds means and spreads.
  const traces = (points, draw) => STUDY.contenders.flatMap((name) => {
    const own = points.filter((point) => point.contender === name);
    if (!own.length) return [];
    const [colour, symbol] = looks.get(name), color = colour || (dark.matches ? "#f2f5fa" : "#1b1d20");
    const { x, y, mode } = draw(own);
    return [{ x, y: y.map((value) => value && value[0]), mode, text: y.map((_, i) => short((own[i] || own[0]).label)),
      error_y: { array: y.map((value) => value && value[1]), color, thickness: 1.2, width: 3 }, hoverinfo: "x+y+text",
      line: { color, width: 1.2, dash: symbol.includes("open") ? "dash" : "solid" }, meta: name, name: short(name),
      marker: { color, symbol, maxdisplayed: 8, size: symbol === "star" ? 14 : 10 }, visible: hidden.has(name) ? "legendonly" : true }];
  });
  const axis = (title, more) => ({ title: { text: title }, fixedrange: true, ticks: "outside", hoverformat: ".4~g", ...more });
  const log = { type: "log", dtick: "D2", tickangle: 0 };
  const quality = axis("NDCG@20, test");
  const against = (points, value) => traces(points.filter((point) => point[value] !== null), (own) => ({
    x: own.map((point) => point[value]), y: own.map((point) => point.quality), mode: "lines+markers" }));

  const pictures = { // traces and layout, of a cell's points and of those at the ratio that was picked
    size(points) {
      const size = picks.size.value, front = [];
      for (const point of [...points].sort((a, b) => a[size] - b[size] || b.quality[0] - a.quality[0])) {
        if (!front.length || point.quality[0] > front.at(-1)[1]) front.push([point[size], point.quality[0]]);
      }
      front.push([1.2 * Math.max(...points.map((point) => point[size])), front.at(-1)[1]]);
      return [[...against(points, size), { x: front.map(([x]) => x), y: front.map(([, y]) => y), mode: "lines",
        name: "Pareto front", line: { shape: "hv", width: 1.5, color: "#888" }, hoverinfo: "skip" }],
      { xaxis: axis(size, { ...log, tickformat: "~s", hoverformat: ".4~s" }), yaxis: quality }];
    },
    latency(points) {
      const times = points.map((point) => point.ms).filter((time) => time !== null);
      const isFar = Math.max(...times) > 8 * Math.min(...times);
      const xaxis = axis("milliseconds to score one user", isFar ? { ...log, tickformat: "~g" } : { rangemode: "tozero" });
      return [against(points, "ms"), { xaxis, yaxis: quality }];
    },
    popularity(_, points) {
      const names = [...new Set(points.flatMap((point) => Object.keys(point.groups)))], x = names.map((_name, i) => i);
      const drawn = traces(points.filter((point) => Object.keys(point.groups).length), ([point]) => ({
        x, y: names.map((name) => point.groups[name] || null), mode: "markers" }));
      return [drawn, { scattermode: "group", yaxis: { ...quality, ...log, tickformat: "~g" },
        xaxis: axis("popularity of the item asked for", { tickvals: x, ticktext: names.map(short) }) }];
    },
    parts(_, points) {
      const sorted = [...points].sort((a, b) => a.parameters - b.parameters), y = sorted.map((_point, i) => i);
      const drawn = [...new Set(sorted.flatMap((point) => Object.keys(point.parts)))].map((name, i) => ({
        type: "bar", orientation: "h", name: short(name), hoverinfo: "x+name", y,
        x: sorted.map((point) => point.parts[name] || 0), marker: { color: ["#7d8893", ...colours][i % 6] } }));
      return [drawn, { barmode: "stack", xaxis: axis("parameters", { tickformat: "~s", hoverformat: "," }),
        yaxis: axis("", { tickvals: y, ticktext: sorted.map((point) => short(point.label)) }) }];
    },
    curves: (_, points) => [traces(points.filter((point) => point.curve.length), ([{ curve }]) => ({
      x: curve.map(([epoch]) => epoch), y: curve.map(([, score]) => [score, null]), mode: "lines+markers" })),
    { xaxis: axis("epoch", { rangemode: "tozero" }), yaxis: axis(`${STUDY.metric}, validation`) }],
  };

  function draw(plot, points, here) {
    const [data, layout] = pictures[plot.dataset.picture](points, here);
    plot.hidden = !data.length;
    plot.nextElementSibling.hidden = !plot.hidden;
    if (plot.hidden) return;
    const isNew = !plot.on, isWide = plot.clientWidth > 640;
    const legend = isWide ? {} : { orientation: "h", y: 1, yanchor: "bottom", font: { size: 10 },
      entrywidth: 0.5, entrywidthmode: "fraction" };
    Plotly.react(plot, data, { template: { layout: STUDY.templates[dark.matches ? "dark" : "light"] }, dragmode: false,
      height: isWide ? 420 : 320 + 10 * data.length, margin: { l: 10, r: 10, t: 10, b: 10 },
      showlegend: true, legend, ...layout }, { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] });
    all(".legendtoggle", plot).forEach((item, at) => Object.assign(item, { tabIndex: 0, onkeydown({ key }) {
      if (key === "Enter") Plotly.restyle(plot, { visible: plot.data[at].visible === true ? "legendonly" : true }, [at]);
    } }));
    if (isNew) plot.on("plotly_restyle", () => { // a name in the legend was pressed: the same in all pictures
      for (const { meta, visible } of plot.data) if (meta) hidden[visible === true ? "delete" : "add"](meta);
      update();
    });
  }

  // Fill a picker, keeping its choice where that is still there.
  function pick(name, values) {
    const select = picks[name], before = select.value;
    select.replaceChildren(...[...new Set(values)].map((value) => new Option(value || "–", value)));
    if (values.includes(before)) select.value = before;
    return select.value;
  }

  function update() {
    const cell = ["dataset", "model", "length"].reduce((left, name) => {
      const value = pick(name, left.map((found) => found[name]));
      return left.filter((found) => found[name] === value);
    }, STUDY.cells)[0];
    const ratio = pick("ratio", cell.ratios), isAll = document.getElementById("all-rows").checked;
    const here = cell.points.filter((point) => point.ratio === null || point.ratio === ratio);
    for (const plot of all(".plot")) draw(plot, cell.points, here);
    document.body.className = isAll ? "" : "one";
    for (const element of all("[data-cell]")) {
      const isHere = element.dataset.cell === String(STUDY.cells.indexOf(cell));
      element.hidden = !isHere && !(isAll && element.matches("tr, details"));
    }
  }

  // By a column; what was not measured comes last either way.
  function sort(heading) {
    const isDown = heading.ariaSort === "ascending", at = heading.cellIndex, { tBodies } = heading.closest("table");
    for (const other of heading.parentElement.cells) other.ariaSort = null;
    heading.ariaSort = isDown ? "descending" : "ascending";
    const { compare } = new Intl.Collator("en", { numeric: true });
    const order = heading.className === "num" ? (x, y) => x - y : compare;
    const rows = [...tBodies[0].rows].map((row) => [row.cells[at].dataset.value, row]);
    rows.sort(([x], [y]) => (x && y ? order(x, y) * (isDown ? -1 : 1) : (x === "") - (y === "")));
    tBodies[0].append(...rows.map(([, row]) => row));
  }

  for (const heading of all("thead th")) heading.addEventListener("click", () => sort(heading));
  for (const input of all("[data-pick], #all-rows")) input.addEventListener("change", update);
  dark.addEventListener("change", update);
  update();
})();
