// Equations are marked by pymdownx.arithmatex as \(...\) and \[...\]; all files are local, so that pages work offline.
document$.subscribe(() => renderMathInElement(document.body, {
  delimiters: [{left: "\\(", right: "\\)", display: false}, {left: "\\[", right: "\\]", display: true}],
}));
