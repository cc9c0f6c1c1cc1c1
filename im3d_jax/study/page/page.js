"use strict";
// Shows one question at a time. An answer is kept in the browser until the server says that it has it, so that
// neither a reload nor a server that is down for a while loses it. Texts enter the page as text alone.

const RETRY_S = [1, 2, 4, 8, 15];
const PATIENCE_S = 60; // for one request, before it is sent again
const GUARD_S = 0.5; // the second half of a double click must not answer the question that comes next
const PENDING = `im3d-study-kept ${location.pathname}`;
const STARTED = `im3d-study-started ${location.pathname}`;
const find = (id) => document.getElementById(id);
const sides = ["left", "right"].map((name) => ({ name, button: find(name), video: find(name).querySelector("video") }));
const storage = openStorage();
let current = null; // what the server said last
let shownAt = 0; // when both videos began to play; 0 until answers are taken
let wantsMore = false; // than their share
let isBlocked = false; // whether the browser lets nothing but a touch start videos

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
// Answers by item that the server may not have; several tabs may share them.
const pending = () => JSON.parse(storage.getItem(PENDING) ?? "{}");
const keepPending = (answers) => storage.setItem(PENDING, JSON.stringify(answers));
const isPending = () => Object.keys(pending()).length > 0;
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

function say(text) {
  find("status").hidden = !text;
  find("status").textContent = text;
}

// Asks until the server answers. What it refuses for good is given back as {refused}.
async function request(path, options) {
  for (let attempt = 0; ; attempt++) {
    try {
      const signal = AbortSignal.timeout(1000 * PATIENCE_S);
      const response = await fetch(path, { cache: "no-store", signal, ...options });
      if (response.ok || (response.status >= 400 && response.status < 500)) {
        const told = await response.json();
        say("");
        return response.ok ? told : { refused: told.error, isStranger: response.status === 404 };
      }
    } catch {
      // No connection, or the server is being started again.
    }
    const seconds = RETRY_S[Math.min(attempt, RETRY_S.length - 1)];
    say(isPending() ? "No connection. Your answer is kept and will be sent again." : "No connection. Trying again.");
    await pause(seconds);
  }
}

// Sends what is kept, and returns what comes next.
async function send() {
  let told = null;
  for (const [item, answer] of Object.entries(pending())) {
    told = await request(`answers${more()}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ item, ...answer }),
    });
    if (told.isStranger) return told; // the study's owner may mend that
    const { [item]: sent, ...others } = pending();
    keepPending(others);
  }
  return !told || told.refused ? request(`next${more()}`) : told.next;
}

async function next() {
  show(await send());
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

// attempt: counts loads of the question's files; a damaged one may be in the browser's cache.
function ask(told, attempt = 0) {
  const address = (file) => (attempt ? `${file}?attempt=${attempt}` : file);
  find("text").textContent = told.question;
  find("hint").textContent = told.hint;
  find("prompt").textContent = told.prompt;
  // What is asked about the object alone is asked without the reference.
  const isReferenceShown = told.kind === "alignment";
  find("reference").hidden = !isReferenceShown;
  find("picture").hidden = !told.picture;
  if (told.picture && isReferenceShown) find("picture").src = address(told.picture);
  only("question");
  shownAt = 0;
  for (const { name, button, video } of sides) {
    button.classList.remove("chosen");
    button.disabled = true;
    video.src = address(told[name]);
    video.load();
  }
  start(attempt);
}

// Starts both videos together, once both can play and the picture is there, and takes answers a moment later.
async function start(attempt) {
  const item = current.item;
  const isStill = () => current && current.item === item && !find("question").hidden;
  const ready = (video) =>
    new Promise((resolve, reject) => {
      if (video.readyState >= 3) return resolve();
      video.oncanplay = () => resolve();
      video.onerror = () => reject(new Error("video"));
    });
  const slow = setTimeout(() => isStill() && say("The videos are being loaded."), 3000);
  try {
    const isPictureShown = current.picture && !find("reference").hidden;
    const pictures = isPictureShown ? [find("picture").decode()] : [];
    await Promise.all([...pictures, ...sides.map(({ video }) => ready(video))]);
  } catch {
    if (!isStill()) return;
    say("A video or picture cannot be loaded. Trying again.");
    await pause(3);
    if (isStill()) ask(current, attempt + 1);
    return;
  } finally {
    clearTimeout(slow);
  }
  if (!isStill()) return;
  say("");
  await play();
  if (!isStill()) return;
  for (const { button } of sides) button.disabled = !isBlocked; // for the touch that starts the videos
  if (!isBlocked) await takeAnswers(item);
}

async function takeAnswers(item) {
  const began = performance.now();
  await pause(GUARD_S);
  if (current.item !== item || find("question").hidden) return;
  shownAt = began;
  for (const { button } of sides) button.disabled = false;
}

async function play() {
  isBlocked = false;
  try {
    await Promise.all(sides.map(({ video }) => video.play()));
  } catch (error) {
    isBlocked = error.name === "NotAllowedError"; // and not that somebody has stopped them
    if (isBlocked) say("Touch the page to start the videos.");
  }
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
  keepPending({ ...pending(), [current.item]: { choice: name, seconds: Math.round(seconds * 1000) / 1000 } });
  await next();
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
async function unblock() {
  if (find("question").hidden || !isBlocked) return;
  say("");
  await play();
  if (!isBlocked && !shownAt) await takeAnswers(current.item);
}

document.addEventListener("pointerup", unblock);
document.addEventListener("keydown", (event) => {
  if (find("question").hidden || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "ArrowLeft") choose("left");
  else if (event.key === "ArrowRight") choose("right");
  else if (event.key === " ") {
    if (isBlocked) unblock();
    else if (sides.some(({ video }) => video.paused)) play();
    else stop();
  } else return;
  event.preventDefault();
});
next();
