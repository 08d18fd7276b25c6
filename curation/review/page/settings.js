// What the person has chosen for this browser: whether scores are shown before a question is answered.

const box = document.getElementById("scores");
const NAME = "sightline-review-scores";

try {
  box.checked = localStorage.getItem(NAME) === "shown";
} catch {
  // A browser that stores nothing starts with hidden scores each time.
}

export function showsScores() {
  return box.checked;
}

export function onScores(changed) {
  box.addEventListener("change", () => {
    try {
      localStorage.setItem(NAME, box.checked ? "shown" : "hidden");
    } catch {
      // As above.
    }
    changed();
  });
}
