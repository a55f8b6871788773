//! What the tutorial shows in 三、进程池. A change of `main` needs a change here.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

const PROPOOL: &str = env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME")));

/// Of forty numbers from [0, 3), the longest and the shortest differ by less than 1 once in 10^17
/// times, and all add up to less than 19.8 once in 10^15 times. A run takes at least a quarter of
/// the sum of its five sleeps, since four workers sleep at once.
#[test]
fn the_tasks_sleep_for_random_times() {
    let runs = [(); 8].map(|()| {
        thread::spawn(|| {
            let begin = Instant::now();
            let (_, times) = run(false);
            (times, begin.elapsed().as_secs_f64())
        })
    });
    let (mut times, mut seconds) = (Vec::new(), 0.0);
    for run in runs {
        let run = run.join().unwrap();
        times.extend(run.0);
        seconds += run.1;
    }
    times.sort_by(f64::total_cmp);
    assert!(times[39] - times[0] > 1.0, "not random: {times:?}");
    assert!(seconds > 19.8 / 4.0, "eight runs took {seconds} seconds");
}

/// A run proves nothing if a worker is held too late, when its first task is over. Then the test
/// makes another run.
#[test]
fn four_workers_measure_the_time_of_their_tasks() {
    for _ in 0..20 {
        let (workers, times) = run(true);
        if workers == 4 && times.iter().any(|&time| time > 3.0) {
            return;
        }
    }
    panic!("there are fewer than four workers, or no task measures its time");
}

/// Runs the demo, and checks all that it prints. Returns the number of workers, and the tasks'
/// times. If `hold`, each worker is stopped in its first task for more than three seconds, so that
/// the others must take the other tasks, and a task that measures its time prints more than 3.
fn run(hold: bool) -> (usize, Vec<f64>) {
    let mut propool = Command::new(PROPOOL);
    let propool = propool.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut run = propool.spawn().unwrap();
    let (mut lines, mut workers, mut holds) = (Vec::new(), HashSet::new(), Vec::new());
    for line in BufReader::new(run.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(task) = line.strip_prefix("Run task ") {
            let worker = task.split(['(', ')']).nth(1).expect(&line);
            if workers.insert(worker.to_string()) && hold {
                let script = format!("kill -STOP {worker}; sleep 3.1; kill -CONT {worker}");
                holds.push(Command::new("/bin/sh").args(["-c", &script]).spawn());
            }
        }
        lines.push(line);
    }
    for hold in holds {
        hold.unwrap().wait().unwrap();
    }
    let run = run.wait_with_output().unwrap();
    assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");

    assert_eq!(lines.len(), 13, "not thirteen lines: {lines:?}");
    let parent = lines[0].strip_prefix("Parent process ").expect(&lines[0]);
    let parent = parent.strip_suffix(".").expect(&lines[0]);
    assert!(!workers.contains(parent), "a task in the parent: {lines:?}");
    assert!(workers.len() <= 4, "more than four workers: {lines:?}");
    assert!(lines.contains(&"Waiting for all subprocesses done...".to_string()));
    assert_eq!(lines[12], "All subprocesses done.");
    let times = [0, 1, 2, 3, 4].map(|task| {
        let place = |begin: &str| lines.iter().position(|line| line.starts_with(begin));
        let run = place(&format!("Run task {task} (")).expect("a task that is run");
        let runs = format!("Task {task} runs ");
        let end = place(&runs).expect("a task that ends");
        assert!(run < end, "task {task} ends before it is run: {lines:?}");
        let time = lines[end][runs.len()..].strip_suffix(" seconds.").unwrap();
        assert_eq!(time.find('.'), Some(time.len() - 3), "not %0.2f: {time}");
        time.parse().unwrap()
    });
    (workers.len(), times.into())
}
