"use strict";
document.getElementById("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  const code = document.getElementById("code").value.trim();
  if (code) location.href = `a/${encodeURIComponent(code)}/`;
});
