// The report: search and sort its labels, and walk through them by keyboard.
(() => {
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const sections = [...document.querySelectorAll("section.label")];
  let at = -1;

  if (search) {
    const body = document.querySelector("#index tbody");
    const rows = [...body.rows];
    const by = {
      given: (one, other) => other.dataset.given - one.dataset.given,
      review: (one, other) => other.dataset.review - one.dataset.review,
      f1: (one, other) => one.dataset.f1 - other.dataset.f1,
      name: (one, other) => one.dataset.name.localeCompare(other.dataset.name),
    };
    const filter = () => {
      const wanted = search.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) shown += !(row.hidden = !row.dataset.name.includes(wanted));
      document.getElementById("nothing").hidden = shown > 0;
    };
    search.addEventListener("input", filter);
    search.addEventListener("keydown", (event) => {
      if (event.key === "Enter") body.querySelector("tr:not([hidden]) a")?.click();
      if (event.key === "Escape") {
        search.value = "";
        filter();
        search.blur();
      }
    });
    sort.addEventListener("change", () => body.append(...rows.sort(by[sort.value])));
  }

  function go(to) {
    at = Math.max(0, Math.min(sections.length - 1, to));
    sections[at].focus({ preventScroll: true });
    sections[at].scrollIntoView({ block: "start" });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    const here = sections.indexOf(document.activeElement);
    if (here >= 0) at = here;
    if (event.key === "j" || event.key === "J") go(at + 1);
    else if (event.key === "k" || event.key === "K") go(at - 1);
    else if (event.key === "/" && search) {
      event.preventDefault();
      search.focus();
    }
  });
})();
