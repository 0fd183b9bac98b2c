//! The report as Markdown and as one HTML page with its charts inside: no script, no font, no file
//! from elsewhere.

use core::fmt::Write;

/// A table of text; the first column names the row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table {
    /// Names of the columns.
    pub head: Vec<String>,
    /// The rows.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new(head: &[&str]) -> Self {
        Self { head: head.iter().map(ToString::to_string).collect(), rows: Vec::new() }
    }

    /// One more row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

/// A part of the report.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Section {
    /// Its heading.
    pub title: String,
    /// What it shows, one paragraph a line.
    pub text: String,
    /// Its table.
    pub table: Table,
    /// Charts, as SVG.
    pub charts: Vec<String>,
}

/// The report in Markdown.
pub fn markdown(title: &str, intro: &[String], sections: &[Section]) -> String {
    let mut out = format!("# {title}\n\n");
    for line in intro {
        let _ = writeln!(out, "{line}\n");
    }
    for s in sections {
        let _ = write!(out, "## {}\n\n", s.title);
        for line in s.text.lines() {
            let _ = writeln!(out, "{line}\n");
        }
        if !s.table.rows.is_empty() {
            let line = |cells: &[String]| {
                format!(
                    "| {} |\n",
                    cells.iter().map(|c| c.replace('|', "\\|")).collect::<Vec<_>>().join(" | ")
                )
            };
            out += &line(&s.table.head);
            let dashes: Vec<_> = (0..s.table.head.len())
                .map(|i| if i == 0 { "---" } else { "---:" }.into())
                .collect();
            out += &line(&dashes);
            s.table.rows.iter().for_each(|r| out += &line(r));
            out.push('\n');
        }
    }
    out
}

const STYLE: &str = "
:root{--ink:#1b2430;--soft:#5b6675;--line:#dfe4ea;--back:#fbfcfd;--card:#fff;
--c0:#1f6feb;--c1:#e8833a;--c2:#2a9d6f;--c3:#a05cc8;--c4:#c94f6d;
--c5:#7a8794;--c6:#d2a928;--c7:#3fb6c6;--c8:#8c5a3c;--c9:#b5c94f;
--good:#1d8a5b;--bad:#c0392b}
@media(prefers-color-scheme:dark){
:root{--ink:#e6ebf1;--soft:#9aa6b4;--line:#2c3642;--back:#11161c;--card:#181f27;
--c0:#5b9cf5;--c1:#f0a068;--c2:#52c497;--c3:#bf8be0;--c4:#e67f97;
--c5:#98a4b1;--c6:#e3c353;--c7:#6fd0dc;--c8:#c08a68;--c9:#cfe06f;
--good:#52c497;--bad:#f07a6c}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.55 system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}
main{max-width:1280px;margin:0 auto;padding:36px 24px 80px}
h1{font-size:28px;line-height:1.2;margin:0 0 14px}
h2{font-size:19px;margin:0 0 8px}
p{margin:0 0 8px;color:var(--soft);max-width:92ch}
.intro p{margin:0 0 3px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:22px 24px;margin-top:22px}
.scroll{overflow-x:auto;margin-top:12px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right}
td:not(:first-child){overflow-wrap:break-word}
th:first-child,td:first-child{text-align:left}
th{color:var(--soft);font-weight:600;vertical-align:bottom}
tr:last-child td{border-bottom:0}
td.good{color:var(--good);font-weight:600}td.bad{color:var(--bad);font-weight:600}
.charts{display:flex;flex-wrap:wrap;gap:18px;margin-top:14px}
svg{flex:1 1 480px;max-width:100%;height:auto}
svg text{fill:var(--ink);font:12px system-ui,'Segoe UI',Roboto,Arial,sans-serif}
svg .soft{fill:var(--soft)}svg .name{font-weight:600;font-size:13px}
svg line,svg path.axis{stroke:var(--line)}
code{font:13px ui-monospace,Menlo,Consolas,monospace}
";

/// The report as a page.
pub fn html(title: &str, intro: &[String], sections: &[Section]) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{0}</title><style>{STYLE}</style></head>\
         <body><main><h1>{0}</h1>\n<div class=\"intro\">",
        escape(title)
    );
    intro.iter().for_each(|line| _ = writeln!(out, "<p>{}</p>", inline(line)));
    out += "</div>\n";
    for s in sections {
        let _ = writeln!(out, "<section><h2>{}</h2>", escape(&s.title));
        s.text.lines().for_each(|line| _ = writeln!(out, "<p>{}</p>", inline(line)));
        if !s.charts.is_empty() {
            let _ = writeln!(out, "<div class=\"charts\">{}</div>", s.charts.concat());
        }
        if !s.table.rows.is_empty() {
            let cells = |row: &[String], tag: &str| -> String {
                row.iter()
                    .map(|c| {
                        let class = match c.as_str() {
                            c if c.starts_with("met") || c == "ok" => " class=\"good\"",
                            c if c.starts_with("missed") || c.starts_with("WRONG") => {
                                " class=\"bad\""
                            }
                            _ => "",
                        };
                        format!("<{tag}{class}>{}</{tag}>", inline(c))
                    })
                    .collect()
            };
            let _ =
                write!(out, "<div class=\"scroll\"><table><tr>{}</tr>", cells(&s.table.head, "th"));
            s.table.rows.iter().for_each(|r| _ = write!(out, "<tr>{}</tr>", cells(r, "td")));
            out += "</table></div>";
        }
        out += "</section>\n";
    }
    out + "</main></body></html>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Text with `code` in backquotes.
fn inline(text: &str) -> String {
    let parts: Vec<_> = text.split('`').map(escape).collect();
    let mut out = String::new();
    for (i, part) in parts.iter().enumerate() {
        out += &if i % 2 == 1 && i + 1 < parts.len() {
            format!("<code>{part}</code>")
        } else {
            part.clone()
        };
    }
    out
}

const WIDTH: f64 = 520.0;
const LEFT: f64 = 168.0;

fn frame(title: &str, height: f64, body: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{0}\">\
         <text class=\"name\" x=\"0\" y=\"14\">{0}</text>{body}</svg>\n",
        escape(title)
    )
}

/// Horizontal bars: name, value, the text at the bar's end, and whether it is ours.
pub fn bars(title: &str, rows: &[(String, f64, String, bool)]) -> String {
    let most = rows.iter().map(|r| r.1).fold(f64::MIN_POSITIVE, f64::max);
    let room = WIDTH - LEFT - 130.0;
    let mut body = String::new();
    for (i, (name, value, text, ours)) in rows.iter().enumerate() {
        let (y, w) = (30.0 + 26.0 * i as f64, (value / most * room).max(1.0));
        let _ = write!(
            body,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"18\" rx=\"3\" \
             fill=\"var(--c{})\"/>\
             <text class=\"soft\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            LEFT - 8.0,
            y + 13.0,
            escape(name),
            if *ours { 0 } else { 5 },
            LEFT + w + 6.0,
            y + 13.0,
            escape(text)
        );
    }
    frame(title, 36.0 + 26.0 * rows.len() as f64, &body)
}

/// Horizontal bars in parts: every row has one value a part, and a text at its end.
pub fn stacked(title: &str, parts: &[String], rows: &[(String, Vec<f64>, String)]) -> String {
    let most = rows.iter().map(|r| r.1.iter().sum()).fold(f64::MIN_POSITIVE, f64::max);
    let room = WIDTH - LEFT - 80.0;
    let mut body = String::new();
    for (i, (name, values, text)) in rows.iter().enumerate() {
        let (y, mut x) = (30.0 + 26.0 * i as f64, LEFT);
        let _ = write!(
            body,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            y + 13.0,
            escape(name)
        );
        for (j, value) in values.iter().enumerate() {
            let w = value / most * room;
            if w > 0.05 {
                let _ = write!(
                    body,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.2}\" height=\"18\" \
                     fill=\"var(--c{})\"/>",
                    j % 10
                );
            }
            x += w;
        }
        let _ = write!(
            body,
            "<text class=\"soft\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x + 6.0,
            y + 13.0,
            escape(text)
        );
    }
    let (mut x, mut y) = (0.0, 46.0 + 26.0 * rows.len() as f64);
    for (j, part) in parts.iter().enumerate() {
        let w = 24.0 + 6.6 * part.len() as f64;
        if x + w > WIDTH {
            (x, y) = (0.0, y + 20.0);
        }
        let _ = write!(
            body,
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" rx=\"2\" \
             fill=\"var(--c{})\"/>\
             <text class=\"soft\" x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
            y - 9.0,
            j % 10,
            x + 15.0,
            escape(part)
        );
        x += w;
    }
    frame(title, y + 10.0, &body)
}

/// A line of a chart: its name and its points.
pub type Line = (String, Vec<(f64, f64)>);

/// Lines over a logarithmic x axis with a tick at every x; y starts at 0.
pub fn lines(title: &str, x_name: &str, y_name: &str, series: &[Line]) -> String {
    let points = || series.iter().flat_map(|s| &s.1);
    let mut xs: Vec<f64> = points().map(|p| p.0).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let (Some(&first), Some(&last)) = (xs.first(), xs.last()) else { return String::new() };
    let top = points().map(|p| p.1).fold(f64::MIN_POSITIVE, f64::max);
    let unit = 10_f64.powf((top / 4.0).log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .map(|m| m * unit)
        .into_iter()
        .find(|s| top / s <= 4.5)
        .unwrap_or(top);
    let ceiling = (top / step).ceil() * step;
    let (left, right, above, below) = (58.0, 508.0, 34.0, 214.0);
    let x = |v: f64| {
        if last > first {
            left + 12.0 + (v / first).ln() / (last / first).ln() * (right - left - 24.0)
        } else {
            left + 40.0
        }
    };
    let y = |v: f64| below - v / ceiling * (below - above);
    let mut body = String::new();
    let mut tick = 0.0;
    while tick <= ceiling * 1.0001 {
        let _ = write!(
            body,
            "<line x1=\"{left}\" x2=\"{right}\" y1=\"{0:.1}\" y2=\"{0:.1}\"/>\
             <text class=\"soft\" x=\"{1:.1}\" y=\"{2:.1}\" text-anchor=\"end\">{3}</text>",
            y(tick),
            left - 6.0,
            y(tick) + 4.0,
            short(tick)
        );
        tick += step;
    }
    for &v in &xs {
        let _ = write!(
            body,
            "<text class=\"soft\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x(v),
            below + 17.0,
            short(v)
        );
    }
    for (i, (_, points)) in series.iter().enumerate() {
        let path: Vec<_> = points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
        let _ = write!(
            body,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"var(--c{})\" stroke-width=\"2\"/>",
            path.join(" "),
            i % 8
        );
        for p in points {
            let _ = write!(
                body,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.2\" fill=\"var(--c{})\"/>",
                x(p.0),
                y(p.1),
                i % 8
            );
        }
    }
    let _ = write!(
        body,
        "<text class=\"soft\" x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
        below + 34.0,
        escape(x_name)
    );
    let _ = write!(
        body,
        "<text class=\"soft\" x=\"{right}\" y=\"14\" text-anchor=\"end\">{}</text>",
        escape(y_name)
    );
    let mut at = 0.0;
    for (i, (name, _)) in series.iter().enumerate() {
        let y = below + 52.0;
        let _ = write!(
            body,
            "<rect x=\"{at:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" rx=\"2\" \
             fill=\"var(--c{})\"/>\
             <text class=\"soft\" x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
            y - 9.0,
            i % 8,
            at + 15.0,
            escape(name)
        );
        at += 30.0 + 6.6 * name.len() as f64;
    }
    frame(title, below + 62.0, &body)
}

/// A number in few characters.
fn short(v: f64) -> String {
    if v >= 1e9 {
        format!("{}G", trim(v / 1e9))
    } else if v >= 1e6 {
        format!("{}M", trim(v / 1e6))
    } else if v >= 1e4 {
        format!("{}k", trim(v / 1e3))
    } else {
        trim(v)
    }
}

fn trim(v: f64) -> String {
    let text = format!("{v:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_the_user_is_escaped_and_code_is_marked() {
        assert_eq!(inline("a<b `x&y` `"), "a&lt;b <code>x&amp;y</code> `".replace(" `", " "));
        let section = Section { title: "<t>".into(), ..Section::default() };
        assert!(html("r", &[], &[section]).contains("&lt;t&gt;"));
    }

    #[test]
    fn charts_keep_their_proportions() {
        let svg =
            bars("b", &[("x".into(), 2.0, "2".into(), true), ("y".into(), 1.0, "1".into(), false)]);
        let room = WIDTH - LEFT - 130.0;
        assert!(
            svg.contains(&format!("width=\"{room:.1}\""))
                && svg.contains(&format!("width=\"{:.1}\"", room / 2.0))
        );
        assert_eq!(lines("empty", "x", "y", &[]), "");
    }

    #[test]
    fn markdown_tables_have_a_rule() {
        let mut table = Table::new(&["a", "b"]);
        table.row(["1|2".into(), "3".into()]);
        let text = markdown("t", &[], &[Section { table, ..Section::default() }]);
        assert!(text.contains("| a | b |\n| --- | ---: |\n| 1\\|2 | 3 |\n"), "{text}");
    }
}
