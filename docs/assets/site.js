// What scrolls sideways can be reached by the Tab key, and scrolled by the arrow keys.
document.addEventListener("DOMContentLoaded", () => {
  for (const part of document.querySelectorAll("pre > code, .arithmatex, .md-typeset__scrollwrap")) part.tabIndex = 0;
});
