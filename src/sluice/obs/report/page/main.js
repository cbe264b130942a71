// Puts the page together, and minds the theme and the navigation.

const THEMES = ["auto", "light", "dark"];

function showTheme(theme) {
  if (theme === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.setAttribute("data-theme", theme);
  at("theme").textContent = `theme: ${theme}`;
  at("theme").dataset.theme = theme;
}

function keepTheme(theme) {
  try { localStorage.setItem("sluice-report-theme", theme); } catch { /* a page from a file may keep nothing */ }
}
function keptTheme() {
  try { return localStorage.getItem("sluice-report-theme") || "auto"; } catch { return "auto"; }
}

at("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(at("theme").dataset.theme) + 1) % THEMES.length];
  showTheme(next);
  keepTheme(next);
});
showTheme(THEMES.includes(keptTheme()) ? keptTheme() : "auto");

showSummary();
showCurves();
showTime();
showFates();
showEpisodes();
showConfiguration();

const links = [...document.querySelectorAll(".sections a")];
const seen = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) for (const link of links) link.classList.toggle("here", link.hash === `#${entry.target.id}`);
}, { rootMargin: "-20% 0px -70% 0px" });
for (const section of document.querySelectorAll("main > section")) seen.observe(section);

at("foot").textContent = `Sluice ${DATA.sluice} · made ${new Date(DATA.made * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC · this file asks no server for anything`;
document.documentElement.dataset.ready = "yes";
