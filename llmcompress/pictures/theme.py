"""The style sheet of pages: light, dark and paper, wide and narrow. Text keeps a contrast of 4.5 or more."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#57606a;--rule:#d8dee4;--wash:#f4f6f8;
--link:#0063a0;--good:#116329;--bad:#a40e26;--unsure:#7a4f01}
@media (prefers-color-scheme:dark){:root{--paper:#15181d;--ink:#e6e9ee;--soft:#a3adba;--rule:#323a45;--wash:#1d2229;
--link:#7cc4f0;--good:#6cd08f;--bad:#ff9a9a;--unsure:#e3b341}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:64rem;padding:2.5rem 1.5rem 4rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
a{color:var(--link)}
h1{font-size:1.9rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:.2rem 0 .4rem;unicode-bidi:isolate}
h2{font-size:1.2rem;line-height:1.3;font-weight:650;margin:0 0 .3rem}
h3{font-size:1rem;font-weight:650;margin:1.5rem 0 .3rem}
p{margin:0 0 .7rem;max-width:44rem}
.soft{color:var(--soft)}
.small{font-size:.875rem}
.good{color:var(--good)}.bad{color:var(--bad)}.unsure{color:var(--unsure)}
.verdict{font-size:1.1rem;margin:.2rem 0 .3rem}header .tiles{margin-top:1.5rem}
.verdict b{font-weight:650}
code,pre{font:.875rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;unicode-bidi:isolate}
pre{margin:.3rem 0 1.2rem;padding:.6rem .8rem;background:var(--wash);border-radius:4px;white-space:pre-wrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:1.4rem 1.8rem;margin:0 0 1.8rem}
.tile{border-top:2px solid var(--ink);padding-top:.45rem;margin:0}
.tile dt{color:var(--soft);font-size:.875rem}
.tile dd{margin:0}
.tile .figure{font-size:1.85rem;line-height:1.25;font-weight:600;letter-spacing:-.02em}
.tile .unit{font-size:1rem;font-weight:400;letter-spacing:0;color:var(--soft)}
nav{border:solid var(--rule);border-width:1px 0;padding:.6rem 0;margin-top:1.2rem;font-size:.875rem}
nav ul{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;list-style:none;margin:0;padding:0}
section{margin:2.6rem 0 0}
section,figure,details{scroll-margin-top:1rem}
figure{margin:.8rem 0 .4rem}
section figure{margin-top:-.6rem}section figure .llmc .head{visibility:hidden}section figure .llmc .paper{fill:none}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;margin:.3rem 0}
caption{text-align:left;color:var(--soft);padding-bottom:.3rem}
th,td{padding:.22rem .9rem .22rem 0;text-align:right;vertical-align:baseline;border-bottom:1px solid var(--rule);
overflow-wrap:normal}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--soft);vertical-align:bottom}
tbody th{font-weight:400;unicode-bidi:isolate}
td{white-space:nowrap}
th:first-child{text-align:left}
.words td,.words th{text-align:left}
.words th{white-space:nowrap;vertical-align:baseline}
.words table{width:100%}
.words td{overflow-wrap:anywhere;white-space:normal}
.words td:nth-child(2):not(:last-child){overflow-wrap:normal}
mark{background:none;color:var(--bad);font-weight:650;border-bottom:2px solid}
.worst{padding-left:1.6rem}.worst li{margin:0 0 1.3rem}.worst pre{margin:.2rem 0 .4rem}.worst p{margin:0}
.beliefs{margin:0;display:grid;gap:.15rem}.beliefs div{display:flex;gap:.8rem}
.beliefs dt{color:var(--soft);flex:0 0 6rem}
.beliefs dd{margin:0;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem}.choice code{background:var(--wash);padding:0 .25em;
white-space:pre-wrap}
summary{cursor:pointer;color:var(--soft);font-size:.875rem;width:fit-content}
summary:hover,summary:focus-visible{color:var(--ink)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.warning{border-left:3px solid var(--unsure);padding-left:.8rem}
footer{margin-top:3rem;border-top:1px solid var(--rule);padding-top:.7rem;color:var(--soft);font-size:.875rem}
@media (max-width:46rem){body{padding:1.4rem 1rem 3rem}h1{font-size:1.5rem}figure svg.llmc{max-width:none}
.tiles{gap:1rem 1.5rem}}
@media print{@page{margin:15mm}
:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--rule:#bbb;--wash:#fff;--good:#116329;--bad:#a40e26;
--unsure:#7a4f01}
body{max-width:none;padding:0;font-size:10pt}
.tiles{grid-template-columns:repeat(5,1fr);gap:1rem}nav,details{display:none}pre{border:1px solid var(--rule)}
section{margin-top:1.5rem}h2,h3{break-after:avoid}figure,tr,.tile{break-inside:avoid}.wide{overflow:visible}
figure svg.llmc{max-width:100%;max-height:235mm;print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
