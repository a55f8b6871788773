//! What the tutorial shows in 三、进程池: whoever changes `main` changes this file, too.

use std::collections::HashSet;
use std::process::Command;
use std::thread;

#[test]
fn five_tasks_are_done_once_each_by_at_most_four_workers() {
    let lines = run();
    assert_eq!(lines.len(), 13, "not thirteen lines: {lines:?}");
    let parent = lines[0].strip_prefix("Parent process ").unwrap();
    let parent = parent.strip_suffix(".").unwrap();
    assert!(lines.contains(&"Waiting for all subprocesses done...".to_string()));
    assert_eq!(lines[12], "All subprocesses done.");

    let mut workers = HashSet::new();
    for task in 0..5 {
        let place = |begin: &str| lines.iter().position(|line| line.starts_with(begin));
        let run = place(&format!("Run task {task} (")).expect("a task that is run");
        let end = place(&format!("Task {task} runs ")).expect("a task that ends");
        assert!(run < end, "task {task} ends before it is run: {lines:?}");
        workers.insert(lines[run].split(['(', ')']).nth(1).unwrap());
    }
    assert!(workers.len() <= 4, "more than four workers: {lines:?}");
    assert!(!workers.contains(parent), "a task in the parent: {lines:?}");
}

/// Forty numbers from [0, 3) lie within a third of it once in 10^17 times.
#[test]
fn the_tasks_take_random_times() {
    let runs = [(); 8].map(|()| thread::spawn(run));
    let lines: Vec<String> = runs
        .into_iter()
        .flat_map(|run| run.join().unwrap())
        .collect();
    let seconds: Vec<f64> = lines
        .iter()
        .filter_map(|line| line.strip_suffix(" seconds.")?.split(' ').next_back())
        .inspect(|time| assert_eq!(time.find('.'), Some(time.len() - 3), "not %0.2f: {time}"))
        .map(|time| time.parse().unwrap())
        .collect();
    assert_eq!(seconds.len(), 40);
    let longest = seconds.iter().copied().fold(0.0, f64::max);
    let shortest = seconds.iter().copied().fold(3.0, f64::min);
    assert!(longest - shortest > 1.0, "not random: {seconds:?}");
}

/// The lines that a run prints.
fn run() -> Vec<String> {
    let run = Command::new(env!("CARGO_BIN_EXE_propool"))
        .output()
        .unwrap();
    assert!(run.status.success(), "{run:?}");
    let output = String::from_utf8(run.stdout).unwrap();
    output.lines().map(String::from).collect()
}
