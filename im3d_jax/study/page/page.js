"use strict";
// Shows one question at a time. An answer is kept in the browser until the server says that it has it, so that
// neither a reload nor a server that is down for a while loses it. Texts enter the page as text alone.

const RETRY_S = [1, 2, 4, 8, 15];
const PENDING = `im3d-study-pending ${location.pathname}`;
const STARTED = `im3d-study-started ${location.pathname}`;
const find = (id) => document.getElementById(id);
const sides = ["left", "right"].map((name) => ({ name, button: find(name), video: find(name).querySelector("video") }));
const storage = openStorage();
let current = null; // what the server said last
let shownAt = 0; // when both videos began to play; 0 before that
let wantsMore = false; // than their share

// A browser may forbid to store; then a reload loses an answer that the server does not have yet, and no other.
function openStorage() {
  try {
    localStorage.setItem("im3d-study", "1");
    return localStorage;
  } catch {
    const kept = new Map();
    return {
      getItem: (key) => kept.get(key) ?? null,
      setItem: (key, value) => kept.set(key, value),
      removeItem: (key) => kept.delete(key),
    };
  }
}

const more = () => (wantsMore ? "?more" : "");
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

function say(text) {
  find("status").hidden = !text;
  find("status").textContent = text;
}

// Asks until the server answers. What it refuses for good is given back as {refused}.
async function request(path, options) {
  for (let attempt = 0; ; attempt++) {
    try {
      const response = await fetch(path, { cache: "no-store", ...options });
      if (response.ok || (response.status >= 400 && response.status < 500)) {
        const told = await response.json();
        say("");
        return response.ok ? told : { refused: told.error };
      }
    } catch {
      // No connection, or the server is being started again.
    }
    const seconds = RETRY_S[Math.min(attempt, RETRY_S.length - 1)];
    say(storage.getItem(PENDING) ? "No connection. Your answer is kept and will be sent again." : "No connection. Trying again.");
    await pause(seconds);
  }
}

async function send() {
  const told = await request(`answers${more()}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: storage.getItem(PENDING),
  });
  storage.removeItem(PENDING);
  return told.refused ? request(`next${more()}`) : told.next;
}

async function next() {
  show(storage.getItem(PENDING) ? await send() : await request(`next${more()}`));
}

function only(id) {
  for (const each of ["intro", "question", "note"]) find(each).hidden = each !== id;
}

function note(title, text, more = false) {
  find("note-title").textContent = title;
  find("note-text").textContent = text;
  find("more").hidden = !more;
  only("note");
}

function show(told) {
  if (told.refused) return note("Sorry", told.refused);
  current = told;
  find("progress").max = told.share;
  find("progress").value = Math.min(told.answered, told.share);
  find("count").textContent = told.answered < told.share ? `${told.answered + 1} of ${told.share}` : `${told.answered} answered`;
  find("share").textContent = told.share;
  stop();
  if (told.state === "over") return note("Thank you!", "All questions are answered. You can close this page.");
  if (told.state === "wait") {
    setTimeout(next, 20000);
    return note("A moment, please", "Others are answering the last questions. This page looks again by itself; you can also close it.");
  }
  if (told.state === "share") {
    return note("Thank you!", "You have done your share, and all of your answers are kept. You can close this page, or go on: there are questions left.", true);
  }
  if (!storage.getItem(STARTED) && told.answered === 0) return only("intro");
  ask(told);
}

function ask(told) {
  find("text").textContent = told.question;
  find("hint").textContent = told.hint;
  find("prompt").textContent = told.prompt;
  // What is asked about the object alone is asked without the reference.
  find("reference").hidden = told.kind !== "alignment";
  find("picture").hidden = !told.picture;
  if (told.picture) find("picture").src = told.picture;
  only("question");
  shownAt = 0;
  for (const { name, button, video } of sides) {
    button.classList.remove("chosen");
    button.disabled = true;
    video.src = told[name];
    video.load();
  }
  start();
}

// Starts both videos together, once both can play, and takes answers from then on.
async function start() {
  const item = current.item;
  const isStill = () => current && current.item === item && !find("question").hidden;
  const ready = (video) =>
    new Promise((resolve, reject) => {
      if (video.readyState >= 3) return resolve();
      video.oncanplay = () => resolve();
      video.onerror = () => reject(new Error("video"));
    });
  try {
    await Promise.all(sides.map(({ video }) => ready(video)));
  } catch {
    if (!isStill()) return;
    say("A video cannot be loaded. Trying again.");
    await pause(3);
    if (isStill()) ask(current);
    return;
  }
  if (!isStill()) return;
  say("");
  play();
  shownAt = performance.now();
  for (const { button } of sides) button.disabled = false;
}

function play() {
  // Where a browser forbids to begin by itself, a touch on the space between begins.
  for (const { video } of sides) video.play().catch(() => say("Touch the page to start the videos."));
}

function stop() {
  for (const { video } of sides) video.pause();
}

async function choose(name) {
  if (!shownAt || find("question").hidden) return; // a second click, or too early
  const seconds = (performance.now() - shownAt) / 1000;
  shownAt = 0;
  for (const side of sides) {
    side.button.disabled = true;
    side.button.classList.toggle("chosen", side.name === name);
  }
  storage.setItem(PENDING, JSON.stringify({ item: current.item, choice: name, seconds: Math.round(seconds * 1000) / 1000 }));
  await Promise.all([pause(0.15), next()]);
}

for (const { name, button } of sides) button.addEventListener("click", () => choose(name));
find("begin").addEventListener("click", () => {
  storage.setItem(STARTED, "1");
  ask(current);
});
find("more").addEventListener("click", () => {
  wantsMore = true;
  next();
});
document.addEventListener("pointerdown", () => {
  if (!find("question").hidden && shownAt && sides.some(({ video }) => video.paused && video.currentTime === 0)) {
    say("");
    play();
  }
});
document.addEventListener("keydown", (event) => {
  if (find("question").hidden || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "ArrowLeft") choose("left");
  else if (event.key === "ArrowRight") choose("right");
  else if (event.key === " ") {
    if (sides.some(({ video }) => video.paused)) play();
    else stop();
  } else return;
  event.preventDefault();
});
next();
