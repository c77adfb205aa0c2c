"""The look of a report: two sets of colours, for page and figures, and the style sheet."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of one colour scheme, as hexadecimal sRGB.

    Every text colour has a contrast of at least 4.5 to 1 with the background (WCAG 2.2, AA).

    Attributes:
        background: Page, figures and masked voxels.
        surface: Behind code and the head of wide tables; close to the background.
        text: Running text.
        muted: Captions, units, axis labels.
        line: Rules, grid lines.
        accent: Links, medians, identity lines.
        warning: The word that opens a warning.
        cycle: Curves and bars, in order of use; after Okabe and Ito, told apart by colour-blind
            readers, and adapted in lightness to the background.
    """

    background: str
    surface: str
    text: str
    muted: str
    line: str
    accent: str
    warning: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    background="#fdfdfb",
    surface="#f4f4f0",
    text="#1b1c1e",
    muted="#5d6167",
    line="#deded8",
    accent="#1d5b9e",
    warning="#8f4a00",
    cycle=("#0072b2", "#d55e00", "#009e73", "#b5528c", "#d98e00", "#3fa3dc"),
)
DARK = Theme(
    background="#131417",
    surface="#1c1e22",
    text="#e7e7e3",
    muted="#a2a6ad",
    line="#32353b",
    accent="#8fbcf0",
    warning="#f0b35e",
    cycle=("#56b4e9", "#f08c46", "#35c79d", "#e39ac4", "#f2d24b", "#a5b8ff"),
)


def style_sheet() -> str:
    """Return the CSS of a page: light, dark, narrow and printed."""
    return f":root{{{_variables(LIGHT)}}}\n" + RULES.replace("DARK_VARIABLES", _variables(DARK))


def _variables(theme: Theme) -> str:
    names = ("background", "surface", "text", "muted", "line", "accent", "warning")
    return ";".join(f"--{name}:{getattr(theme, name)}" for name in names)


# Only fonts that the reader's system has: a page that opens without network can load none. Figures
# are 9 inches (864 px) wide at most, and so is the text column.
RULES = """
:root{color-scheme:light dark;
--sans:Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
@media (prefers-color-scheme:dark){:root{DARK_VARIABLES}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--background);color:var(--text);font:400 1rem/1.6 var(--sans);
overflow-wrap:break-word}
.page{max-width:57rem;margin:0 auto;padding:4.5rem 1.5rem 5rem}
h1,h2,h3{line-height:1.2;font-weight:620;letter-spacing:-.014em;text-wrap:balance}
h1{font-size:2.25rem;margin:0;letter-spacing:-.022em}
h2{font-size:1.375rem;margin:0 0 1.25rem}
h3{font-size:1rem;margin:2.5rem 0 .625rem;letter-spacing:0}
p{margin:0 0 1em;max-width:42em}
a{color:var(--accent);text-decoration-thickness:1px;text-underline-offset:.16em}
a:focus-visible,summary:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--accent);
outline-offset:3px;border-radius:2px}
.subtitle{margin:.75rem 0 0;font-size:1.125rem;line-height:1.5;color:var(--muted)}
.summary{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.75rem,1fr));gap:2rem 1.5rem;
margin:2.75rem 0 0;padding:1.75rem 0 0;border-top:1px solid var(--line)}
.summary>div{display:flex;flex-direction:column;min-width:0}
.summary dt{font-size:.875rem;line-height:1.4;color:var(--muted)}
.summary dd{margin:0}
.summary .value{font-size:1.75rem;line-height:1.3;font-weight:560;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.summary .value.words{font-size:1.125rem;line-height:2.25rem;letter-spacing:-.005em}
.summary .unit{font-size:.8125rem;line-height:1.45;color:var(--muted)}
nav{margin:2.75rem 0 0;font-size:.9375rem}
nav h2{margin:0 0 .5rem;font-size:.875rem;font-weight:500;letter-spacing:0;color:var(--muted)}
nav ol{margin:0;padding:0;list-style:none;columns:15rem;column-gap:2rem}
nav li{padding:.15rem 0;break-inside:avoid}
nav a{color:inherit;text-decoration:none}
nav a:hover{text-decoration:underline}
main>section{margin-top:4rem;scroll-margin-top:1.5rem}
figure{margin:2.25rem 0}
h2+figure,h3+figure{margin-top:0}
figure img{display:block;max-width:100%;height:auto}
figcaption,caption{font-size:.875rem;line-height:1.55;color:var(--muted);text-align:left}
figcaption{margin-top:.875rem;max-width:48em}
.number{color:var(--text);font-weight:560;margin-right:.375em}
.scroll{overflow-x:auto;max-width:100%}
.tabular{margin:2.25rem 0}
h2+.tabular,h3+.tabular{margin-top:0}
table{border-collapse:collapse;font-size:.9375rem;line-height:1.45;
font-variant-numeric:tabular-nums}
caption{padding:0 0 .875rem;max-width:48em}
th,td{padding:.4375rem 1.75rem .4375rem 0;text-align:left;vertical-align:baseline}
th:last-child,td:last-child{padding-right:0}
thead th{font-size:.8125rem;font-weight:500;color:var(--muted);vertical-align:bottom}
thead tr>*{border-bottom:1px solid var(--text)}
tbody th{font-weight:400}
tbody tr+tr>*{border-top:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:1px solid var(--line)}
td,th{min-width:4rem;max-width:26rem}
.numeric{text-align:right;white-space:nowrap}
.prose{min-width:18rem}
.undefined{color:var(--muted)}
.viewer button,.viewer select{font:inherit;font-size:.9375rem;color:var(--text);background:var(--surface);
border:1px solid var(--line);border-radius:4px;padding:.375rem .75rem}
.viewer button{cursor:pointer;color:var(--accent)}
.viewer .panel[hidden],.viewer button[hidden]{display:none}
.viewer .view{height:26rem;border-radius:4px;overflow:hidden;background:#000}
.viewer canvas{display:block;width:100%;height:100%}
.viewer .controls{display:flex;flex-wrap:wrap;gap:.5rem 1.5rem;margin:.75rem 0 0;font-size:.875rem;color:var(--muted)}
.viewer label{display:flex;align-items:center;gap:.5em}
.viewer output{display:block;min-height:1.55em;margin-top:.5rem;font-size:.875rem;font-variant-numeric:tabular-nums}
.viewer .failed:empty{display:none}
.note{margin:1.75rem 0;padding:0 0 0 1rem;border-left:2px solid var(--line);max-width:43em}
.note strong{font-weight:600;margin-right:.375em}
.note.warning{border-color:var(--warning)}
.note.warning strong{color:var(--warning)}
.empty{color:var(--muted)}
.run{padding-top:2.5rem;border-top:1px solid var(--line)}
pre{margin:0;padding:.875rem 1rem;background:var(--surface);border-radius:4px;overflow-x:auto}
code{font:400 .875em/1.6 var(--mono)}
pre code{font-size:.875rem;user-select:all}
summary{cursor:pointer;width:fit-content}
summary::marker{color:var(--muted)}
.count{color:var(--muted);font-size:.875rem;margin-left:.375em}
.tree{margin:.375rem 0 .375rem .3rem;padding:0 0 0 1.1rem;list-style:none;font-size:.9375rem;
border-left:1px solid var(--line)}
.tree li{padding:.1rem 0}
.tree .key{color:var(--muted);margin-right:.75em}
.share{width:9rem}
.share span{display:block;height:.3125rem;min-width:1px;background:var(--muted);opacity:.55}
.versions{display:flex;flex-wrap:wrap;gap:.25rem 1.75rem;margin:0;font-size:.9375rem}
.versions div{display:flex;gap:.5em}
.versions dt{color:var(--muted)}
.versions dd{margin:0;font-variant-numeric:tabular-nums}
@media (min-width:82rem){
.page.has-contents{display:grid;grid-template-columns:11rem minmax(0,54rem);column-gap:4rem;
max-width:72rem;align-items:start}
.has-contents>header,.has-contents>main{grid-column:2}
.has-contents>nav{grid-column:1;grid-row:1/span 2;position:sticky;top:4.5rem;margin-top:.5rem;
max-height:calc(100vh - 6rem);overflow-y:auto;font-size:.875rem;line-height:1.45}
.has-contents>nav ol{columns:auto}.has-contents>nav li{padding:.25rem 0}}
@media (max-width:40rem){
.page{padding:2.25rem 1.125rem 3.5rem}
h1{font-size:1.75rem}
.subtitle{font-size:1rem}
.summary{grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:1.5rem 1.25rem;
margin-top:1.75rem;padding-top:1.5rem}
.summary .value{font-size:1.5rem}
main>section{margin-top:3rem}
nav ol{columns:auto}
figure img.wide{max-width:none;width:38rem}
th,td{padding-right:1.25rem}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
@media print{
@page{margin:18mm 16mm}
.viewer{display:none}
body{font-size:10pt}
.page,.page.has-contents{display:block;max-width:none;padding:0}
nav{display:none}
main>section{margin-top:2rem}
h2,h3{break-after:avoid}
figure,.note,tr,.summary>div{break-inside:avoid}
.scroll,pre{overflow:visible}
pre code{white-space:pre-wrap}
figure img,figure img.wide{width:auto;max-width:100%}
details::details-content{content-visibility:visible;block-size:auto}}
"""
