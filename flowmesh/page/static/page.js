// Brings the page up to date: its main part is fetched again, and the log of a task. Without this, reloading does it.
"use strict";
const live = document.getElementById("live");
const text = async (url) => {
  const answer = await fetch(url, { headers: { accept: "text/html" }, redirect: "error" });
  return answer.text();
};
const showLog = async () => {
  const log = document.getElementById("log");
  if (!log) return;
  const end = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  const found = (await text(log.dataset.log)) || "The log is empty.";
  if (log.textContent === found) return;
  log.textContent = found;
  if (end) log.scrollTop = log.scrollHeight;
};
const renew = async () => {
  const every = Number(live.dataset.every || 0);
  if (!every) return;
  try {
    if (!document.hidden && getSelection().isCollapsed) {
      const fresh = new DOMParser().parseFromString(await text(location.href), "text/html").getElementById("live");
      const oldLog = document.getElementById("log");
      const newLog = fresh.querySelector("#log");
      const open = [...live.querySelectorAll("details")].map((each) => each.open);
      fresh.querySelectorAll("details").forEach((each, at) => { each.open = Boolean(open[at]); });
      const top = oldLog ? oldLog.scrollTop : 0;
      if (oldLog && newLog) newLog.textContent = oldLog.textContent;
      live.replaceChildren(...fresh.childNodes);
      if (newLog) newLog.scrollTop = top;
      if (fresh.dataset.every) live.dataset.every = fresh.dataset.every;
      else delete live.dataset.every;
      await showLog();
    }
  } catch {
    // the node restarts: the next try shows it
  }
  setTimeout(renew, every);
};
showLog().catch(() => {});
setTimeout(renew, Number(live.dataset.every || 0));
