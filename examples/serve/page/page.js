"use strict";

const SHOWN = 60; // films in the list at a time
const FEW = 20000; // items of a catalogue in which a search takes next to nothing
const $ = (id) => document.getElementById(id);
const picked = []; // tokens, oldest first
const times = new Map(); // milliseconds of each model's answers
let films = [];
let byToken = new Map();
let asked = 0; // requests of former picks are not shown any more

const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

async function fetched(path, body) {
  const options = body && {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  const found = await response.json().catch(() => ({ error: `${path}: status ${response.status}` }));
  if (!response.ok) throw new Error(found.error || `${path}: status ${response.status}`);
  return found;
}

function size(bytes) {
  for (const [unit, step] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= step) return `${(bytes / step).toFixed(bytes < 10 * step ? 2 : bytes < 100 * step ? 1 : 0)} ${unit}`;
  }
  return `${bytes} bytes`;
}

const milliseconds = (value) => `${value.toFixed(value < 10 ? 2 : 1)} ms`;

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

const film = (token) => byToken.get(token) || { token, title: token };

function named(token) {
  const { title, year } = film(token);
  const found = element("span", "title", title);
  if (year) found.append(" ", element("span", "year", year));
  return found;
}

function showModels(models) {
  const largest = Math.max(...Object.values(models).map((model) => model.bytes));
  $("models").replaceChildren(...Object.entries(models).map(([name, model]) => {
    const card = $("card").content.firstElementChild.cloneNode(true);
    card.dataset.model = name;
    card.querySelector("h3").textContent = name;
    card.querySelector(".bytes").textContent = size(model.bytes);
    card.querySelector(".parameters").textContent = model.parameters.toLocaleString("en");
    card.querySelector(".bar span").style.width = `${(100 * model.bytes) / largest}%`;
    return card;
  }));
  const [first, ...rest] = Object.entries(models);
  const words = rest.map(([name, model]) => {
    const times = first[1].bytes / model.bytes;
    return `${name} is ${times >= 1 ? `${times.toFixed(1)} times smaller than` : `${(1 / times).toFixed(1)} times as large as`} ${first[0]}`;
  });
  // measured in README.md, Under load
  if (first[1].items < FEW) words.push("With so few items either takes about as long: what is saved is memory");
  const kind = `${first[1].kind}, ${first[1].items.toLocaleString("en")} items`;
  $("summary").textContent = [`${kind}.`, ...words.map((each) => `${each}.`), "Pick films that you have seen."].join(" ");
}

function showFound() {
  const text = $("search").value.trim().toLowerCase();
  const here = films.filter(({ token, title }) => !picked.includes(token) && title.toLowerCase().includes(text));
  $("found").replaceChildren(...here.slice(0, SHOWN).map(({ token }) => {
    const button = element("button");
    button.type = "button";
    button.dataset.token = token;
    button.append(named(token));
    const row = element("li");
    row.append(button);
    return row;
  }));
  const hidden = here.length - SHOWN;
  $("more").textContent = !films.length
    ? "The service has no titles: type a token of the catalogue and press Enter."
    : hidden > 0 ? `${hidden.toLocaleString("en")} more: type a part of the title.`
      : here.length ? "" : "No film has this in its title.";
}

function showPicked() {
  $("picked").replaceChildren(...picked.map((token) => {
    const button = element("button", "", film(token).title);
    button.type = "button";
    button.dataset.token = token;
    button.setAttribute("aria-label", `Remove ${film(token).title}`);
    const row = element("li");
    row.append(button);
    return row;
  }));
  $("nothing").hidden = picked.length > 0;
  $("clear").hidden = picked.length === 0;
}

function showAnswers(answers) {
  const lists = Object.fromEntries(answers.map(({ model, tokens }) => [model, tokens]));
  for (const { model, tokens, milliseconds: took } of answers) {
    const card = [...$("models").children].find((each) => each.dataset.model === model);
    times.set(model, [...(times.get(model) || []), took]);
    card.querySelector(".ms").textContent = milliseconds(took);
    card.querySelector(".median").textContent = milliseconds(median(times.get(model)));
    const others = Object.keys(lists).filter((name) => name !== model);
    card.querySelector(".best").replaceChildren(...tokens.map((token, at) => {
      const row = element("li");
      const text = element("div");
      text.append(named(token));
      if (others.length === 1) {
        const there = lists[others[0]].indexOf(token);
        row.className = there < 0 ? "only" : "";
        const place = there === at ? "the same place" : `place ${there + 1} there`;
        text.append(element("span", "also", there < 0 ? "only here" : place));
      }
      row.append(text);
      return row;
    }));
  }
  const [first, second] = Object.values(lists);
  $("agreement").textContent = second && Object.keys(lists).length === 2
    ? `${first.filter((token) => second.includes(token)).length} of ${first.length} are on both lists.` : "";
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function recommend() {
  const mine = ++asked;
  showError("");
  if (!picked.length) {
    $("agreement").textContent = "";
    document.querySelectorAll(".best").forEach((list) => list.replaceChildren());
    document.querySelectorAll(".ms").forEach((each) => { each.textContent = "–"; });
    return;
  }
  $("models").classList.add("waiting");
  try {
    const answers = [];
    for (const card of $("models").children) { // one after the other: they share the processor
      const body = { history: picked, k: Number($("k").value), exclude_seen: true, model: card.dataset.model };
      answers.push(await fetched("recommend", body));
      if (mine !== asked) return;
    }
    showAnswers(answers);
  } catch (error) {
    if (mine === asked) showError(error.message);
  } finally {
    if (mine === asked) $("models").classList.remove("waiting");
  }
}

function changed() {
  showPicked();
  showFound();
  return recommend();
}

function pick(token) {
  if (!picked.includes(token)) picked.push(token);
  $("search").value = "";
  changed();
}

$("search").addEventListener("input", showFound);
$("search").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  const first = $("found").querySelector("button");
  const token = first ? first.dataset.token : !films.length && $("search").value.trim();
  if (token) pick(token);
});
$("found").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) pick(button.dataset.token);
});
$("picked").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  picked.splice(picked.indexOf(button.dataset.token), 1);
  changed();
});
$("clear").addEventListener("click", () => {
  picked.length = 0;
  changed();
});
$("k").addEventListener("change", recommend);

Promise.all([fetched("models"), fetched("titles")]).then(([models, titles]) => {
  films = titles;
  byToken = new Map(films.map((each) => [each.token, each]));
  showModels(models);
  showPicked();
  showFound();
}).catch((error) => showError(error.message));
