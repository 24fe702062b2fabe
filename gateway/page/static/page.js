// The page's clock: asks for the cluster once a second, and gives what came to those who draw it.

import { byteRate, count, milliseconds, percent } from "./format.js";
import { fillGroups, fillPhases, noteGroups, Tiles } from "./groups.js";
import { HeatMap } from "./heatmap.js";
import { PromptBox } from "./prompt.js";
import { Rates } from "./rates.js";
import { apiKey, Failed, get, Refused, setApiKey } from "./source.js";
import { setText } from "./svg.js";
import { fillLegend, linkRate, noteLinks, stateWord, Topology } from "./topology.js";

const PERIOD_MS = 1000;
const MAX_RETRY_MS = 5000;
const RATE_WINDOW_S = 5;
const LEVELS = ["EP off", "EP Level 1, broadcast", "EP Level 2, targeted"];

const find = (id) => document.getElementById(id);
const rates = new Rates(RATE_WINDOW_S);
const tiles = new Tiles(find("tiles"));
const topology = new Topology(find("topology"), find("links"));
const heatMap = new HeatMap({
  canvas: find("heat"),
  box: find("heat-scroll"),
  foot: find("heat-foot"),
  empty: find("heat-empty"),
  hottest: find("heat-hottest"),
  replicas: find("heat-replicas"),
  scale: find("heat-scale"),
  top: find("heat-top"),
  periods: [...document.querySelectorAll("input[name=period]")],
});
const promptBox = new PromptBox({
  form: find("prompt-form"),
  label: find("prompt-label"),
  prompt: find("prompt"),
  maxTokens: find("max-tokens"),
  temperature: find("temperature"),
  send: find("send"),
  stop: find("stop"),
  answer: find("answer"),
  note: find("answer-note"),
});

const shown = { gateway: null, expertLoad: null, placement: null, heardAt: null, failures: 0 };
let timer = 0;
let isPolling = false;

async function poll() {
  if (isPolling) return;
  isPolling = true;
  clearTimeout(timer);
  try {
    const news = await fetchNews();
    if (news) show(news);
  } finally {
    isPolling = false;
    const wait = Math.min(MAX_RETRY_MS, PERIOD_MS * Math.max(1, shown.failures));
    timer = setTimeout(poll, document.hidden ? MAX_RETRY_MS : wait);
  }
}

// What there is to show, or null where nothing could be had; the page then says why.
async function fetchNews() {
  try {
    const news = await fetchDocuments();
    shown.failures = 0;
    shown.heardAt = performance.now();
    find("key-form").hidden = true;
    connection("live", "live");
    return news;
  } catch (error) {
    shown.failures += 1;
    if (error instanceof Refused) showKeyForm();
    else showGone(error);
    return null;
  }
}

// The large documents are asked for only when they have changed.
async function fetchDocuments() {
  const cluster = await get("cluster");
  const isOther = cluster.gateway.instance_epoch !== shown.gateway;
  const news = { cluster, placement: null, totals: null };
  if (isOther || cluster.placement_epoch !== shown.placement) {
    news.placement = await get("cluster/placement");
  }
  if (isOther || cluster.expert_load_version !== shown.expertLoad) {
    news.totals = await get("cluster/experts");
  }
  return news;
}

function showExperts({ cluster, placement, totals }, seconds) {
  shown.gateway = cluster.gateway.instance_epoch;
  if (placement) {
    heatMap.setPlacement(placement);
    shown.placement = placement.epoch;
  }
  if (totals) {
    heatMap.setTotals(totals, seconds);
    shown.expertLoad = totals.version;
  }
  heatMap.tick(seconds);
}

function show(news) {
  const { cluster } = news;
  const seconds = performance.now() / 1000;
  noteLinks(cluster, rates, seconds);
  noteGroups(cluster, rates, seconds);
  for (const [name, total] of Object.entries(cluster.requests)) rates.note(name, total, seconds);
  rates.forgetOlder(seconds);
  showExperts(news, seconds);
  const { layout, model } = cluster;
  setText(find("model"), model.name);
  setText(
    find("layout"),
    `attention dp ${layout.dp_size} × tp ${layout.tp_size} · experts ep ${layout.ep_size} × tp ${layout.etp_size} · ` +
      `${LEVELS[layout.expert_parallel_degree]} · ${layout.enable_mla ? "MLA cache" : "per-head K/V cache"}`,
  );
  showMissing(cluster);
  showTiles(cluster);
  topology.update(cluster, rates);
  fillGroups(find("groups"), cluster, rates);
  promptBox.setModel(model);
  promptBox.setReady(cluster.gateway.state === "ready");
}

function showMissing(cluster) {
  const box = find("missing");
  const missing = ["attn", "expert"].flatMap((role) =>
    Object.entries(cluster.counts[role])
      .filter(([state]) => state !== "ready")
      .map(([state, number]) => `${number} ${role} ${stateWord(state)}`),
  );
  const isReady = cluster.gateway.state === "ready";
  box.hidden = isReady && !missing.length;
  const words = isReady ? "Serving, but not whole: " : "Not ready: ";
  setText(box, words + (missing.join(", ") || "the gateway is getting ready"));
}

function showTiles(cluster) {
  const loads = cluster.groups.flatMap((group) => (group.load ? [group.load] : []));
  const sum = (name) => loads.reduce((total, load) => total + load[name], 0);
  const ready = sumCounts(cluster, (state) => state === "ready");
  const all = sumCounts(cluster, () => true);
  const perSecond = (name) => sumRates(cluster, name);
  const [tokens, steps, flow] = [perSecond("output_tokens"), perSecond("steps"), rateOfLinks(cluster)];
  const step = steps > 0 ? perSecond("step_s") / steps : null;
  tiles.set("Processes ready", `${ready}/${all}`);
  tiles.set("Tokens/s", count(tokens), "generated", tokens);
  tiles.set("Running", count(sum("num_running")), `${count(sum("num_waiting"))} waiting`, sum("num_running"));
  tiles.set("KV cache", percent(sum("kv_tokens_used"), sum("kv_tokens")), `of ${count(sum("kv_tokens"))} tokens`);
  showLatency(cluster, step);
  tiles.set("Between the tiers", byteRate(flow), "both ways", flow);
  tiles.set("Placement", `epoch ${cluster.placement_epoch}`);
}

function sumCounts(cluster, wanted) {
  return Object.values(cluster.counts)
    .flatMap(Object.entries)
    .reduce((total, [state, number]) => total + (wanted(state) ? number : 0), 0);
}

function rateOfLinks(cluster) {
  return cluster.links.reduce((total, link) => total + (linkRate(link, rates) ?? 0), 0);
}

function sumRates(cluster, name) {
  return cluster.groups.reduce((sum, group) => sum + (rates.rate(`dp ${group.dp_rank} ${name}`) ?? 0), 0);
}

// What clients have waited for lately; while nobody asks, how it was since the gateway began.
function showLatency(cluster, step) {
  const mean = (seconds, number) => {
    const totals = cluster.requests;
    return rates.ratio(seconds, number) ?? (totals[number] > 0 ? totals[seconds] / totals[number] : null);
  };
  tiles.set("First token", milliseconds(mean("first_token_s", "first_tokens")), "mean wait");
  tiles.set("Between tokens", milliseconds(mean("between_tokens_s", "between_tokens")), `step ${milliseconds(step)}`);
}

function connection(state, words) {
  const pill = find("connection");
  pill.dataset.state = state;
  setText(pill, words);
  document.body.classList.toggle("stale", state !== "live");
}

function showGone(error) {
  promptBox.setReady(false);
  const never = shown.heardAt === null;
  const age = never ? "" : `, last heard ${Math.round((performance.now() - shown.heardAt) / 1000)} s ago`;
  const what = error instanceof Failed ? `gateway failed: ${error.message}` : "gateway gone";
  connection("gone", `${what}${age}; reconnecting`);
}

function showKeyForm() {
  const given = apiKey() !== "";
  find("key-form").hidden = false;
  setText(find("key-message"), given ? "The gateway refused this key." : "This gateway asks for an API key.");
  promptBox.setReady(false);
  connection("refused", given ? "key refused" : "key needed");
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setApiKey(find("key").value.trim());
  find("key").value = "";
  void poll();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) void poll();
});
fillLegend(find("legend"));
fillPhases(find("phases"));
promptBox.setReady(false);
void poll();
