"use strict";
document.getElementById("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = document.getElementById("code").value.trim();
  const code = given.match(/\/a\/([^/]+)/)?.[1] ?? given; // somebody may enter the whole link
  if (code) location.href = `a/${encodeURIComponent(code)}/`;
});
